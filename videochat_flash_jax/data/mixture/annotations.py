"""Rules of annotation mixtures: which rows, media and frames are used, and how rows are grouped.

The rules are those of the official training code, so that its published mixtures mean the same
here. Three of its faults are corrected: a misspelt or incomplete sampling word is an error (there
it keeps everything), `random` works, and a clip of a picture folder may begin with the first
picture (there it never does).

  strategy       rows kept of [0 1 2 3 4 5 6]
  all            0 1 2 3 4 5 6
  first:3        0 1 2               first2:3, first3:3, first4:3: the second, third, fourth three
  end:25%        5 6                 a share of the whole file is rounded up to a row
  random:3       0 2 6, for example  in the order of the file; the same for the same seed
"""

import difflib
import heapq
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

import numpy as np

from videochat_flash_jax.data.media.files import exists, is_address
from videochat_flash_jax.data.media.frame_sampling import dynamic_num_frames, training_indices
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

_BLOCKS = {"first": 0, "first2": 1, "first3": 2, "first4": 3}
_STRATEGIES = ("all", *_BLOCKS, "end", "random")
_NUMBER = re.compile(r"\s*([+-]?\d{1,18})\s*(%?)\s*")
_FEWEST_FRAMES = 8


def kept_rows(num_rows: int, strategy: str = "all", seed: int = 0) -> range | np.ndarray:
  """Returns the indices of the rows that a strategy keeps of a file, rising.

  The module's docstring has a table of the strategies. As in the original, a count is used as in a
  Python slice: a count beyond the end keeps everything, and so does `end:0`; a negative `first`
  drops rows at the end.

  Args:
    num_rows: number of rows of the file.
    strategy: `all`, or a word with `:` and a count or a percentage.
    seed: of `random`.

  Returns:
    A range, or int64 `[number of kept rows]`.

  Raises:
    InputError: the strategy is unknown or incomplete, or it keeps no row.
  """
  word, number = strategy_parts(strategy)
  count = _count(number, num_rows)
  rows = range(num_rows)
  if word == "all":
    kept = rows
  elif word == "end":
    kept = rows[-count:]
  elif word == "random":
    size = min(max(count, 0), num_rows)
    kept = np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))
  else:
    block = _BLOCKS[word]
    kept = rows[block * count : (block + 1) * count]
  if not len(kept):
    raise InputError(f"sampling strategy {strategy!r:.80} keeps no row of {num_rows}; ask for more")
  return kept


def strategy_parts(strategy: str) -> tuple[str, str]:
  """Splits a sampling strategy: "first:25%" -> ("first", "25%"), "all" -> ("all", "").

  Raises:
    InputError: the strategy is unknown or incomplete.
  """
  word, colon, number = strategy.partition(":")
  if word not in _STRATEGIES:
    raise InputError(f"sampling strategy {strategy!r:.80} is unknown; {nearest(word, _STRATEGIES)}")
  if (word == "all") == bool(colon):
    raise InputError(
      f"sampling strategy {strategy!r:.80}: write 'all', or '{word}:100', '{word}:25%'"
    )
  if colon and not _NUMBER.fullmatch(number):
    found = (
      f"sampling strategy {strategy!r:.80}: {number!r:.80} is not a whole number or a percentage"
    )
    raise InputError(f"{found}; write 100 or 25%")
  return word, number


def _count(number, num_rows):
  if not number:
    return num_rows
  count, percent = _NUMBER.fullmatch(number).groups()
  return -(-int(count) * num_rows // 100) if percent else int(count)


def kind_of(row: Mapping) -> str:
  """Returns what a row shows: "image", "video" or, if it has neither, "text"."""
  return next((kind for kind in ("image", "video") if row.get(kind) is not None), "text")


def with_full_paths(
  row: Mapping,
  media_type: str,
  data_root: str = "",
  video_read_type: str | None = None,
  confined: bool = True,
) -> dict:
  """Returns a row with full paths of its media; the given row is not changed.

  Args:
    row: a row of an annotation file, or of a mixture's entry.
    media_type: `image` or `video`; with `text` and `mix`, paths are not changed.
    data_root: folder, or address, to which the paths are relative.
    video_read_type: how videos are read; it is written into the row.
    confined: whether a path that leads out of `data_root` is an error.

  Raises:
    BrokenRow: the row has no such medium, no path of it, or one that leads out of `data_root`.
  """
  if media_type in ("text", "mix"):
    return dict(row)
  if row.get(media_type) is None:
    for field in difflib.get_close_matches(media_type, row.keys() - {media_type}, n=1):
      raise BrokenRow("bad media field", f"field {field!r:.80}: did you mean {media_type!r:.80}?")
    raise BrokenRow(
      "bad media field",
      f"no field '{media_type}', but its file is of that kind; move the row to another file, or "
      "give media_type 'mix'",
    )
  paths = media_paths(row, media_type)
  for path in paths if data_root and confined else ():
    if not _is_below(path, data_root):
      raise BrokenRow(
        "outside data_root",
        f"path {path!r:.80} leads out of {data_root!r:.80}; correct or remove it",
      )
  full = [path if is_address(path) else os.path.join(data_root, path) for path in paths]
  added = {"video_read_type": video_read_type} if video_read_type else {}
  return {**row, media_type: full if isinstance(row[media_type], list) else full[0], **added}


def media_paths(row: Mapping, kind: str) -> list[str]:
  """Returns the paths in a row's field "image" or "video", which holds one path or a list of them.

  Raises:
    BrokenRow: the field holds something else.
  """
  paths = row[kind]
  listed = paths if isinstance(paths, list) else [paths]
  if not listed or not all(isinstance(path, str) and path and "\0" not in path for path in listed):
    raise BrokenRow("bad media field", f"field '{kind}' is {paths!r:.200}; give a path, or a list")
  return listed


def _is_below(path, folder):
  full = _normalized(path if is_address(path) else os.path.join(folder, path))
  folder = _normalized(folder)
  return full == folder or full.startswith(folder.rstrip("/") + "/")


def _normalized(path):
  """Returns a path or an address without `.` and `..`, so that prefixes can be compared."""
  if not is_address(path):
    return os.path.abspath(path)
  protocol, _, name = path.partition("://")
  return f"{protocol}://{os.path.normpath(unquote(name))}"


def check_media(rows: Sequence[Mapping]) -> None:
  """Checks that at least one of some rows' files exists; none do if `data_root` is wrong.

  Raises:
    InputError: none of the files exists.
  """
  paths = [media_paths(row, kind_of(row))[0] for row in rows if kind_of(row) != "text"]
  if paths and not any(exists(path) for path in paths):
    raise InputError(f"{paths[0]}: no such file, nor those of other rows; correct data_root")


def annotated_clip(row: Mapping) -> tuple[float, float] | None:
  """Returns start and end of a row's clip in seconds, or None if one of them is not given.

  Raises:
    InputError: they are not numbers, or the clip ends before it starts.
  """
  times = row.get("start"), row.get("end")
  if None in times:
    return None
  try:
    start, end = map(float, times)
  except (TypeError, ValueError, OverflowError):
    start = end = math.nan
  if not start < end < math.inf:
    named = " and ".join(f"{time!r:.100}" for time in times)
    raise InputError(f"fields 'start' and 'end' are {named}; correct the times")
  return start, end


def has_half_clip(row: Mapping) -> bool:
  """Returns whether a row has only one of `start` and `end`, which has no effect."""
  return (row.get("start") is None) != (row.get("end") is None)


def num_clip_frames(
  seconds: float, sample: str, *, min_frames: int, max_frames: int, local_frames: int
) -> int:
  """Returns how many frames a clip has in training.

  It is one a second for `dynamic_fps1`, else max_frames. 8.5 s with local_frames=4 give 8 frames.
  They also do if min_frames=64, because a clip that short lowers min_frames.
  """
  if sample != "dynamic_fps1":
    return max_frames
  bounds = {"min_frames": min_frames, "max_frames": max_frames, "local_frames": local_frames}
  return int(dynamic_num_frames(seconds, 1.0, **bounds))


def picture_indices(
  sample: str, num_pictures: int, fps: float, start: float, end: float, **bounds
) -> np.ndarray:
  """Picks pictures of a folder shown at `fps`, evenly spaced between two times, both ends included.

  10 pictures at 1 fps, 2 s to 9 s, 4 picks: 2 4 7 9.

  Returns:
    int64 `[T]`.

  Raises:
    InputError: there is no picture between the two times.
  """
  end = min(end, num_pictures / fps)
  num_inside = int((end - start) * fps)
  if num_inside < 1:
    found = f"clip from {start:g} s to {end:g} s holds no frame of a video"
    raise InputError(f"{found} of {num_pictures / fps:.2f} s: correct its start and end")
  num_picks = len(training_indices(sample, num_inside, fps, **bounds))
  first, last = max(0, round(start * fps)), min(round(end * fps), num_pictures - 1)
  return np.around(np.linspace(first, last, num_picks)).astype(np.int64)


def length_in_words(row: Mapping) -> int:
  """Counts the words of all turns; a placeholder between spaces counts as one word."""
  return sum(len(turn["value"].split()) for turn in row["conversations"])


def media_length(kind: str, max_frames: int) -> int:
  """Returns how many words a row's media count for.

  Images count for 128. A video counts for 16 a frame, for as many frames as a video may have, but
  at least 8. Text counts for 0.
  """
  return {"image": 128, "video": 16 * max(_FEWEST_FRAMES, max_frames), "text": 0}[kind]


def deal_evenly(indices: Sequence[int], lengths: Sequence[int], num_groups: int) -> list[list[int]]:
  """Deals rows into groups of equal size and about equal length.

  Each row in turn goes to the group that is shortest so far and not yet full. If the number of rows
  is not a multiple of the number of groups, the rows are dealt round robin.

      lengths 9 8 5 4 2 1, two groups: rows 0 3 4 (9 4 2) and rows 1 2 5 (8 5 1)
  """
  size, rest = divmod(len(indices), num_groups)
  if rest:
    return [list(indices[group::num_groups]) for group in range(num_groups)]
  groups = [[] for _ in range(num_groups)]
  open_groups = [(0, group) for group in range(num_groups)]  # a heap: the shortest is first
  for index in indices:
    total, group = heapq.heappop(open_groups)
    groups[group].append(index)
    if len(groups[group]) < size:
      heapq.heappush(open_groups, (total + lengths[index], group))
  return groups


def nearest(word: str, words: Iterable[str]) -> str:
  """Returns the end of an error message about a misspelt word: "did you mean video?"."""
  near = difflib.get_close_matches(word.lower(), words, n=2)
  return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(words)}"
