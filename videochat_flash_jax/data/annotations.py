"""Rules of annotation mixtures: which rows of a file, which media, which frames, how grouped.

They are those of the official training code, so that its published mixtures mean here what they
mean there. Mended are: a misspelt or incomplete sampling word is an error (there it keeps
everything), `random` works, and a clip of a folder may begin with its first picture (there it
never does).

  strategy       rows kept of [0 1 2 3 4 5 6]
  all            0 1 2 3 4 5 6
  first:3        0 1 2               first2:3, first3:3, first4:3: the second, third, fourth three
  end:25%        5 6                 a share of the whole file is rounded up to a row
  random:3       0 2 6, say          in the file's order; the same for the same seed
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from videochat_flash_jax.data.frame_sampling import dynamic_num_frames, training_indices
from videochat_flash_jax.errors import InputError

_BLOCKS = {"first": 0, "first2": 1, "first3": 2, "first4": 3}
_STRATEGIES = ("all", *_BLOCKS, "end", "random")
_MEDIA_TYPES = ("image", "video", "text", "mix")
_IMAGE_LENGTH = 128  # tokens that an image counts for when rows are grouped by length
_FRAME_LENGTH = 16
_FEWEST_FRAMES = 8
_NUM_PROBED = 3


def sample_rows(rows: Sequence, strategy: str = "all", seed: int = 0) -> list:
  """Keeps a part of a file's rows; see the module's table.

  As in the original a count is used as in a Python slice: beyond the end it keeps everything,
  `end:0` too, and a negative `first` drops rows from the end.

  Args:
    rows: of one file.
    strategy: `all`, or a word with `:` and a count or a percentage.
    seed: of `random`.

  Raises:
    InputError: the strategy is unknown or incomplete, or it leaves no row.
  """
  word, colon, number = strategy.partition(":")
  if word not in _STRATEGIES:
    raise InputError(f"sampling strategy {strategy!r} is unknown; {_nearest(word, _STRATEGIES)}")
  if (word == "all") == bool(colon):
    raise InputError(f"sampling strategy {strategy!r}: write 'all', or '{word}:100', '{word}:25%'")
  count = _count(strategy, number, len(rows)) if colon else 0
  if word == "all":
    kept = rows
  elif word == "end":
    kept = rows[-count:]
  elif word == "random":
    size = min(max(count, 0), len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), size, replace=False)
    kept = [rows[index] for index in sorted(chosen)]
  else:
    block = _BLOCKS[word]
    kept = rows[block * count : (block + 1) * count]
  if not kept:
    raise InputError(f"sampling strategy {strategy!r} leaves no row of {len(rows)}; ask for more")
  return list(kept)


def _count(strategy, number, num_rows):
  match = re.fullmatch(r"\s*([+-]?\d+)\s*(%?)\s*", number)
  if not match:
    found = f"sampling strategy {strategy!r}: {number!r} is no whole number or percentage"
    raise InputError(f"{found}; write 100 or 25%")
  count = int(match[1])
  return -(-count * num_rows // 100) if match[2] else count


def resolve_media(
  rows: Sequence[Mapping],
  data_root: str = "",
  media_type: str | None = None,
  video_read_type: str | None = None,
) -> list[dict]:
  """Rows with whole paths of their media; the rows given stay as they are.

  Args:
    rows: of one file, all of one kind.
    data_root: folder that paths are relative to.
    media_type: `image` or `video`; `text` and `mix` leave paths alone. By default what the first
      row has.
    video_read_type: how videos are read, noted in each row.

  Raises:
    InputError: the media type is unknown, or a row has no such medium or no path of it.
  """
  if media_type is None:
    kinds = [kind for kind in ("image", "video") if rows and kind in rows[0]]
    media_type = kinds[0] if kinds else "text"
  if media_type not in _MEDIA_TYPES:
    raise InputError(f"media type {media_type!r} is unknown; {_nearest(media_type, _MEDIA_TYPES)}")
  if media_type in ("text", "mix"):
    return [dict(row) for row in rows]
  noted = {"video_read_type": video_read_type} if video_read_type else {}
  resolved = []
  for number, row in enumerate(rows):
    if media_type not in row:
      raise InputError(
        f"row {number} has no field '{media_type}', but its file is of that kind; "
        "move it to another file, or give media_type 'mix'"
      )
    paths = row[media_type]
    listed = paths if isinstance(paths, list) else [paths]
    if not listed or not all(isinstance(path, str) for path in listed):
      raise InputError(f"row {number}: field '{media_type}' is {paths!r}; give a path, or a list")
    whole = [os.path.join(data_root, path) for path in listed]
    resolved.append({**row, media_type: whole if isinstance(paths, list) else whole[0], **noted})
  return resolved


def check_media(rows: Sequence[Mapping]) -> None:
  """Looks whether any of the first three rows' files exists: a wrong `data_root` shows at once.

  Raises:
    InputError: none does.
  """
  media = [row.get("image") or row.get("video") for row in rows[:_NUM_PROBED]]
  paths = [item[0] if isinstance(item, list) else item for item in media if item]
  if paths and not any(os.path.exists(path) for path in paths):
    raise InputError(f"{paths[0]}: no such file, nor those of the next rows; mend data_root")


def annotated_clip(row: Mapping) -> tuple[float, float] | None:
  """Start and end of a row's clip in seconds, or None: both have to be given.

  Raises:
    InputError: they are no numbers, or the clip ends before it starts.
  """
  times = row.get("start"), row.get("end")
  if None in times:
    return None
  try:
    start, end = map(float, times)
  except (TypeError, ValueError):
    start = end = math.nan
  if not start < end < math.inf:
    raise InputError(f"fields 'start' and 'end' are {times[0]!r} and {times[1]!r}; mend the times")
  return start, end


def num_clip_frames(
  seconds: float, sample: str, *, min_frames: int, max_frames: int, local_frames: int
) -> int:
  """How many frames a clip gives in training: for `dynamic_fps1` one a second, else the most.

  8.5 s with local_frames=4 give 8, also if min_frames=64, which a clip that short lowers.
  """
  if sample != "dynamic_fps1":
    return max_frames
  bounds = {"min_frames": min_frames, "max_frames": max_frames, "local_frames": local_frames}
  return int(dynamic_num_frames(seconds, 1.0, **bounds))


def window_indices(
  sample: str, num_frames: int, fps: float, start: float, end: float, **bounds
) -> np.ndarray:
  """Picks frames between two times as `training_indices` does from a whole video.

  The last tenth of a second is left out, where decoders fail. This is the rule at evaluation; in
  training clips are read by `frame_sampling.clip_indices`.
  """
  start, end = max(start, 0.0), min(end, num_frames / fps - 0.1)
  num_inside = _frames_inside(num_frames, fps, start, end)
  return int(start * fps) + training_indices(sample, num_inside, fps, **bounds)


def picture_indices(
  sample: str, num_pictures: int, fps: float, start: float, end: float, **bounds
) -> np.ndarray:
  """Picks pictures of a folder shown at `fps`, evenly between two times, both ends included.

  10 pictures at 1 fps, 2 s to 9 s, 4 picks: 2 4 7 9.
  """
  end = min(end, num_pictures / fps)
  num_inside = _frames_inside(num_pictures, fps, start, end)
  num_picks = len(training_indices(sample, num_inside, fps, **bounds))
  first, last = max(0, round(start * fps)), min(round(end * fps), num_pictures - 1)
  return np.around(np.linspace(first, last, num_picks)).astype(np.int64)


def _frames_inside(num_frames, fps, start, end):
  num_inside = int((end - start) * fps)
  if num_inside < 1:
    raise InputError(
      f"clip from {start:g} s to {end:g} s holds no frame of a video of {num_frames / fps:.2f} s: "
      "mend its start and end"
    )
  return num_inside


def length_in_words(row: Mapping) -> int:
  """Words of all turns; a placeholder counts as one where blanks surround it."""
  return sum(len(turn["value"].split()) for turn in row["conversations"])


def estimated_length(row: Mapping, max_frames: int) -> int:
  """A row's length for grouping: its words, 128 for images, 16 a frame for as many as allowed."""
  if "image" in row:
    return length_in_words(row) + _IMAGE_LENGTH
  if "video" in row:
    return length_in_words(row) + max(_FEWEST_FRAMES, max_frames) * _FRAME_LENGTH
  return length_in_words(row)


def deal_evenly(indices: Sequence[int], lengths: Sequence[int], num_groups: int) -> list[list[int]]:
  """Deals rows into groups of equal size and about equal length.

  In turn each row goes to the group that is shortest so far and not yet full; if the number of
  rows is no multiple, they are dealt round robin.

      lengths 9 8 5 4 2 1, two groups: rows 0 3 4 (9 4 2) and rows 1 2 5 (8 5 1)
  """
  size, rest = divmod(len(indices), num_groups)
  if rest:
    return [list(indices[group::num_groups]) for group in range(num_groups)]
  groups, totals = [[] for _ in range(num_groups)], [0] * num_groups
  for index in indices:
    open_groups = [group for group in range(num_groups) if len(groups[group]) < size]
    shortest = min(open_groups, key=totals.__getitem__)
    groups[shortest].append(index)
    totals[shortest] += lengths[index]
  return groups


def _nearest(word, words):
  near = difflib.get_close_matches(word.lower(), words, n=2)
  return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(words)}"
