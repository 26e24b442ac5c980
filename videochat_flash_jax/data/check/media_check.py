"""Reads a whole mixture before a run does, and reports what is broken.

Every row is read and checked. A sample of the media, evenly spaced over each source, is opened, or
all media. The first and the last frame of a video are decoded; an image is decoded completely. If
a run's reader is given, these rows, and those of text, are also read as in that run.
"""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.examples import ExampleReader
from videochat_flash_jax.data.batches.row_media import (
  choose_frames,
  open_row_video,
  read_row_images,
  read_tiles,
  row_video_path,
)
from videochat_flash_jax.data.media.video_reader import VideoInfo
from videochat_flash_jax.data.mixture.annotations import check_media, has_half_clip, media_paths
from videochat_flash_jax.data.mixture.broken import BrokenRow, any_error_breaks
from videochat_flash_jax.data.mixture.mixture import Mixture
from videochat_flash_jax.data.mixture.rows import Rows, open_usable_rows
from videochat_flash_jax.errors import InputError, one_line

NUM_OFFENDERS = 5  # broken rows that are named, for each reason and source
_NUM_PROBED = 16  # rows of each source, of which `check_roots` looks for the media
_ROWS_AT_ONCE = 2048
_ROWS_WITH_MEDIA_AT_ONCE = 64
_CONFIG = ExampleConfig(image_size=32)  # the decoded frames are not used, so a small size will do
_NUM_REMEMBERED_FILES = 1024  # rows about the same video are often neighbours


@dataclasses.dataclass
class SourceReport:
  """What was found in the rows of one source, or in a part of them.

  Attributes:
    source: path of the annotation file.
    rows: number of rows.
    kinds: number of rows that show a video, an image or neither.
    words: words of all conversations.
    opened: number of media opened: "video", "image".
    frames: frames of the opened videos.
    seconds: length of the opened videos.
    damaged: opened videos of which a decoded frame was repaired or missing; a run can use them.
    half_clips: rows that have only one of `start` and `end`, which is then ignored.
    cut: rows whose answers are cut in the run, because a training row has no room for them.
    broken: rows that cannot be used, by reason.
    offenders: a few of them, by reason: the row's name and what is wrong.
    problem: why none of its rows can be read, or "".
  """

  source: str
  rows: int = 0
  kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  words: int = 0
  opened: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  frames: int = 0
  seconds: float = 0.0
  damaged: int = 0
  half_clips: int = 0
  cut: int = 0
  broken: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  offenders: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  problem: str = ""

  def add_broken(self, label: str, error: BrokenRow) -> None:
    """Counts a row that cannot be used; the first ones of each reason are kept as examples."""
    self.broken[error.reason] += 1
    examples = self.offenders.setdefault(error.reason, [])
    if len(examples) < NUM_OFFENDERS:
      examples.append(_with_name(label, error.detail.removeprefix(f"{one_line(self.source)} ")))

  def add(self, other: "SourceReport") -> None:
    """Adds what was found in further rows of the same source."""
    for field in dataclasses.fields(self):
      if field.name not in ("source", "offenders", "problem"):
        setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
    for reason, messages in other.offenders.items():
      examples = self.offenders.setdefault(reason, [])
      examples.extend(messages[: NUM_OFFENDERS - len(examples)])


def check_roots(rows: Rows) -> None:
  """Looks for some media of each source, so that a wrong `data_root` is found before a run.

  Raises:
    InputError: none of the media of a source exist; names the source and its data_root.
  """
  for source, (start, stop) in zip(rows.sources, rows.source_ranges, strict=True):
    probed = []
    for index in start + _evenly_spaced(_NUM_PROBED, stop - start):
      with contextlib.suppress(BrokenRow):
        probed.append(rows[index])
    try:
      check_media(probed)
    except InputError as error:
      root = f"data_root {source.data_root}" if source.data_root else "which has no data_root"
      raise InputError(f"{source.json_path}, {root}: {error}") from error


def check_sources(
  mixture: Mixture,
  num_sampled: int | None,
  cache_dir: str | os.PathLike | None = None,
  reader: ExampleReader | None = None,
) -> list[SourceReport]:
  """Checks a mixture as `check_mixture` does, even if some annotation files cannot be read.

  Raises:
    InputError: there is only one annotation file, and it cannot be read.
  """
  rows, problems = open_usable_rows(mixture, cache_dir)
  if problems and len(mixture.sources) == 1:
    raise InputError(problems[mixture.sources[0]])
  found = iter(check_mixture(rows, num_sampled, reader) if rows else ())
  return [
    SourceReport(source.json_path, problem=problems[source]) if source in problems else next(found)
    for source in mixture.sources
  ]


def check_mixture(
  rows: Rows, num_sampled: int | None, reader: ExampleReader | None = None
) -> list[SourceReport]:
  """Checks all rows of a mixture and opens media, on all cores.

  Args:
    rows: rows of the mixture.
    num_sampled: number of rows of each source whose media are opened; None opens all.
    reader: of the run that the mixture is for; it tells which rows are too long.

  Returns:
    A report for each source, in the order of the sources.
  """
  _open_file.cache_clear()  # files may have changed since the last check
  reports = [SourceReport(source.json_path) for source in rows.sources]
  tasks = list(_tasks(rows, num_sampled))
  bar = tqdm(total=len(rows), desc="checking", unit="row", leave=False, disable=None)
  with bar:
    for (number, _, _), report in zip(tasks, _run(rows, reader, tasks), strict=True):
      reports[number].add(report)
      bar.update(report.rows)
  return reports


def _tasks(rows, num_sampled) -> Iterator[tuple[int, range, frozenset[int]]]:
  """Yields (index of the source, rows to check, rows among them whose media are opened)."""
  for number, (start, stop) in enumerate(rows.source_ranges):
    count = stop - start if num_sampled is None else num_sampled
    sampled = start + _evenly_spaced(count, stop - start)
    size = _ROWS_WITH_MEDIA_AT_ONCE if num_sampled is None else _ROWS_AT_ONCE
    for first in range(start, stop, size):
      checked = range(first, min(first + size, stop))
      inside = sampled[np.searchsorted(sampled, first) : np.searchsorted(sampled, checked.stop)]
      yield number, checked, frozenset(inside.tolist())


def _evenly_spaced(count: int, num_rows: int) -> np.ndarray:
  """Returns the indices of at most `count` of `num_rows` rows, evenly spaced, int `[count]`."""
  count = min(count, num_rows)
  return np.arange(count) * num_rows // max(count, 1)


def _run(rows: Rows, reader: ExampleReader | None, tasks: list) -> Iterable[SourceReport]:
  num_processes = min(os.cpu_count() or 1, len(tasks))
  if num_processes == 1:
    yield from (_check_rows(rows, reader, *task[1:]) for task in tasks)
    return
  # The rows are sent to each process once, not with every task.
  spawn = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(num_processes, spawn, _keep_rows, (rows, reader)) as executor:
    results = executor.map(_check_kept_rows, *list(zip(*tasks, strict=True))[1:])
    for _, checked, _ in tasks:
      try:
        yield next(results)
      except BrokenProcessPool as error:
        source, first = rows.source(checked.start), rows.label(checked.start)
        raise InputError(
          f"{source}: a process that checked rows was killed, because memory was short or because "
          f"a file crashed FFmpeg or Pillow; {len(checked)} rows from {first} on are the first "
          "ones without a result; free some memory, or check those and the next ones alone"
        ) from error


def _keep_rows(rows: Rows, reader: ExampleReader | None) -> None:
  """Keeps the rows and their reader in a global variable of this process."""
  globals()["_kept"] = rows, reader


def _check_kept_rows(checked: range, opened: frozenset[int]) -> SourceReport:
  """Checks some of the rows that `_keep_rows` kept in this process."""
  return _check_rows(*globals()["_kept"], checked, opened)


def _check_rows(
  rows: Rows, reader: ExampleReader | None, checked: range, opened: frozenset[int]
) -> SourceReport:
  """Checks the rows `checked`, and opens the media of those in `opened`."""
  report = SourceReport(rows.source(checked.start))
  for index in checked:
    _check_row(rows, index, report, index in opened, reader)
  return report


def usable_rows(
  rows: Rows, reports: Sequence[SourceReport]
) -> Iterator[tuple[int, dict, SourceReport]]:
  """Checks all rows and opens all of their media, one after another.

  Args:
    rows: rows of a mixture.
    reports: one for each source; what is found is counted there.

  Yields:
    The index of a row that can be used, the row, and the report of its source.

  Raises:
    InputError: an annotation file is missing or has changed.
  """
  _open_file.cache_clear()
  bar = tqdm(total=len(rows), desc="checking", unit="row", leave=False, disable=None)
  with bar:
    for report, (start, stop) in zip(reports, rows.source_ranges, strict=True):
      for index in range(start, stop):
        row = _check_row(rows, index, report, is_opened=True)
        bar.update()
        if row is not None:
          yield index, row, report


def _check_row(rows, index, report, is_opened, reader=None) -> dict | None:
  """Checks a row, and counts what is found; returns the row, or None if it cannot be used."""
  kind = rows.kind(index)
  report.rows += 1
  report.kinds[kind] += 1
  report.words += rows.words(index)
  try:
    with any_error_breaks(kind):
      row = rows[index]
      report.half_clips += has_half_clip(row)
      if is_opened and kind != "text":
        _open_media(row, kind, report)
      if reader is not None and (is_opened or kind == "text"):
        report.cut += reader.read(row, np.random.default_rng(0)).is_cut
      return row
  except BrokenRow as error:
    report.add_broken(rows.label(index), error)
    return None


def _with_name(label, message):
  """Returns the message with the row's name before it.

  The name is not added if the message begins with it, or with a file's path that ends with it.
  """
  begins_so = re.match(rf"(.*/)?{re.escape(label)}: ", message)
  return message if begins_so else f"{label}: {message}"


def _open_media(row, kind, report):
  paths = [row_video_path(row)] if kind == "video" else media_paths(row, kind)
  for path in paths:
    found = _open_file(kind, path, row.get("video_read_type"), len(paths) == 1)
    if found.problem:
      raise BrokenRow(*found.problem)
    report.opened[kind] += 1
    if found.info:
      report.frames += found.info.num_frames
      report.seconds += found.info.seconds
      report.damaged += found.is_damaged
      choose_frames(row, found.info, _CONFIG)


class _Found(NamedTuple):
  """What opening a file showed: the video's `info`, or what is wrong with the file.

  `problem` is reason and detail of a `BrokenRow`; the error itself would keep the file open.
  """

  info: VideoInfo | None = None
  is_damaged: bool = False
  problem: tuple[str, str] | None = None


@functools.lru_cache(_NUM_REMEMBERED_FILES)
def _open_file(kind: str, path: str, read_type: str | None, is_alone: bool) -> _Found:
  """Decodes as much of a file as is needed to see whether it is complete.

  An image that is not alone in its row is padded to a square, for which it may be too long.
  """
  try:
    with any_error_breaks(kind):
      if kind == "image":
        (image,) = read_row_images({"image": path})
        read_tiles(image, (1, 1) if is_alone else None, _CONFIG.image_size)
        return _Found()
      with open_row_video({"video": path, "video_read_type": read_type}) as video:
        for _ in video.frames([0, video.info.num_frames - 1], _CONFIG.image_size):
          pass
        return _Found(video.info, video.damaged)
  except BrokenRow as error:
    return _Found(problem=(error.reason, error.detail))
