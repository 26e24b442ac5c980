"""Reads a whole mixture before a run does, and tells what is broken.

Every row is read and checked. Of the media a sample is opened, spread evenly over each source, or
all of them: of a video the first and the last frame are decoded, an image is decoded whole.
"""

import collections
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.annotations import annotated_clip, media_paths
from videochat_flash_jax.data.broken import BrokenRow, because
from videochat_flash_jax.data.frame_sampling import clip_indices
from videochat_flash_jax.data.image_reader import read_image
from videochat_flash_jax.data.rows import Rows
from videochat_flash_jax.data.video_reader import VideoInfo, open_video

NUM_OFFENDERS = 5  # of a reason and a source that are named
_ROWS_AT_ONCE = 2048
_ROWS_WITH_MEDIA_AT_ONCE = 64
_LOOKED_AT_SIZE = 32  # pixels; frames are decoded, not looked at
_REMEMBERED_FILES = 1024  # rows about one video tend to follow one another


@dataclasses.dataclass
class SourceReport:
  """What was found in the rows of one source, or in a part of them.

  Attributes:
    source: path of the annotation file.
    rows: how many there are.
    kinds: rows that show a video, an image or neither.
    words: of all conversations.
    opened: media opened: "video", "image".
    frames: of the videos opened.
    seconds: of the videos opened.
    broken: rows that cannot be used, by reason.
    offenders: a few of them: what is wrong, and with which row, by reason.
  """

  source: str
  rows: int = 0
  kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  words: int = 0
  opened: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  frames: int = 0
  seconds: float = 0.0
  broken: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  offenders: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def add(self, other: "SourceReport") -> None:
    """Adds what was found in further rows."""
    for field in ("rows", "kinds", "words", "opened", "frames", "seconds", "broken"):
      setattr(self, field, getattr(self, field) + getattr(other, field))
    for reason, messages in other.offenders.items():
      named = self.offenders.setdefault(reason, [])
      named.extend(messages[: NUM_OFFENDERS - len(named)])


def check_mixture(rows: Rows, num_sampled: int | None) -> list[SourceReport]:
  """Checks all rows of a mixture and opens media, on all cores.

  Args:
    rows: of the mixture.
    num_sampled: rows of each source whose media are opened; None opens all.

  Returns:
    A report for each source, in their order.
  """
  _open_file.cache_clear()  # files may have changed since the last check
  reports = [SourceReport(source.json_path) for source in rows.sources]
  tasks = list(_tasks(rows, num_sampled))
  bar = tqdm(total=len(rows), desc="checking", unit="row", leave=False, disable=None)
  with bar:
    for (number, _, _), report in zip(tasks, _run(rows, tasks), strict=True):
      reports[number].add(report)
      bar.update(report.rows)
  return reports


def _tasks(rows, num_sampled) -> Iterator[tuple[int, range, frozenset[int]]]:
  """Yields (source, rows to check, those whose media are opened)."""
  for number, (start, stop) in enumerate(rows.source_ranges):
    count = stop - start if num_sampled is None else min(num_sampled, stop - start)
    sampled = start + np.arange(count) * (stop - start) // max(count, 1)
    size = _ROWS_WITH_MEDIA_AT_ONCE if num_sampled is None else _ROWS_AT_ONCE
    for first in range(start, stop, size):
      checked = range(first, min(first + size, stop))
      inside = sampled[np.searchsorted(sampled, first) : np.searchsorted(sampled, checked.stop)]
      yield number, checked, frozenset(inside.tolist())


def _run(rows: Rows, tasks: list) -> Iterable[SourceReport]:
  num_processes = min(os.cpu_count() or 1, len(tasks))
  if num_processes == 1:
    yield from (_check_rows(rows, *task[1:]) for task in tasks)
    return
  # Each process gets the rows once, not with every task.
  spawn = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(num_processes, spawn, _keep_rows, (rows,)) as executor:
    yield from executor.map(_check_kept_rows, *list(zip(*tasks, strict=True))[1:])


def _keep_rows(rows: Rows) -> None:
  globals()["_kept_rows"] = rows


def _check_kept_rows(checked: range, opened: frozenset[int]) -> SourceReport:
  return _check_rows(globals()["_kept_rows"], checked, opened)


def _check_rows(rows: Rows, checked: range, opened: frozenset[int]) -> SourceReport:
  source = rows.source(checked.start)
  report = SourceReport(source, rows=len(checked))
  report.words = int(rows.words(checked).sum())
  for index in checked:
    kind = rows.kind(index)
    report.kinds[kind] += 1
    try:
      row = rows[index]
      if index in opened and kind != "text":
        _open_media(row, kind, report)
    except BrokenRow as error:
      report.broken[error.reason] += 1
      named = report.offenders.setdefault(error.reason, [])
      if len(named) < NUM_OFFENDERS:
        message = str(error).removeprefix(f"{error.reason}: ").removeprefix(f"{source} ")
        named.append(_named(rows.label(index), message))
  return report


def _named(label, message):
  """The message, with the row's name before it unless it begins so."""
  return message if message.startswith(f"{label}:") else f"{label}: {message}"


def _open_media(row, kind, report):
  for path in media_paths(row, kind):
    found = _open_file(kind, path)
    if isinstance(found, BrokenRow):
      raise found
    report.opened[kind] += 1
    if kind == "video":
      report.frames += found.num_frames
      report.seconds += found.seconds
      if clip := annotated_clip(row):
        with because("bad times"):
          clip_indices(found.num_frames, found.fps, *clip, 1)


@functools.lru_cache(_REMEMBERED_FILES)
def _open_file(kind: str, path: str) -> VideoInfo | BrokenRow | None:
  """Decodes what shows whether a file is whole; gives a video's facts, or what is wrong."""
  reason = f"unreadable {kind}"
  try:
    with because(reason, path):
      if kind == "image":
        read_image(path)
        return None
      with open_video(path, num_threads=1) as video:
        for _ in video.frames([0, video.info.num_frames - 1], _LOOKED_AT_SIZE):
          pass
        return video.info
  except BrokenRow as error:
    return error
  except Exception as error:  # whatever a decoder makes of a broken file
    return BrokenRow(reason, f"{path}: {type(error).__name__}: {error}")
