"""The rows of a mixture, which may be millions, read one at a time.

  rows = open_rows(read_mixture("stage3.yaml"))
  len(rows), rows.kind(7)       # 3_412_087, "video"
  rows[7]                       # {"video": "/data/videos/a.mp4", "conversations": [...]}

The kind and the words of a row are known before the row is read: they are in small files mapped
into memory, see row_index.py. `Rows` itself holds only paths. A few kilobytes are sent to a worker
process, which opens the files when it needs them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from bisect import bisect_right
from pathlib import Path

import numpy as np

from videochat_flash_jax.caches import cache_folder
from videochat_flash_jax.data.mixture.annotations import (
  kept_rows,
  kind_of,
  media_length,
  media_paths,
  with_full_paths,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.mixture import Mixture, Source
from videochat_flash_jax.data.mixture.row_check import check_object, check_row
from videochat_flash_jax.data.mixture.row_index import KINDS, RowIndex, TextFile, row_index
from videochat_flash_jax.data.mixture.row_text import parse_row
from videochat_flash_jax.errors import InputError, one_line

INDICES = "rows"  # the folder of indices, see `caches.cache_folder`
_NUM_IN_FINGERPRINT = 100  # rows of each source


def open_rows(
  mixture: Mixture, cache_dir: str | os.PathLike | None = None, max_frames: int = 512
) -> "Rows":
  """Opens the rows of a mixture; makes the indices that are not in the cache yet.

  Args:
    mixture: from `read_mixture`.
    cache_dir: folder of the indices; by default that of `caches`.
    max_frames: the most frames of a video, for `Rows.lengths`.

  Raises:
    InputError: an annotation file cannot be read, or none of its rows is kept.
  """
  parts = []
  for source in mixture.sources:
    parts.append(_open_part(source, cache_dir, parts))
  return Rows(mixture.path, tuple(parts), max_frames)


def open_usable_rows(
  mixture: Mixture, cache_dir: str | os.PathLike | None = None
) -> tuple["Rows | None", dict[Source, str]]:
  """Opens rows as `open_rows` does, but leaves out the sources of which no row can be read.

  Returns:
    The rows of all other sources, None if there are none; and for each source that is left out,
    why.
  """
  parts, problems = [], {}
  for source in mixture.sources:
    try:
      parts.append(_open_part(source, cache_dir, parts))
    except InputError as error:
      problems[source] = str(error)
  return Rows(mixture.path, tuple(parts), max_frames=512) if parts else None, problems


def _open_part(source, cache_dir, parts_before) -> "_Part":
  index = row_index(source.json_path, Path(cache_dir or cache_folder(INDICES)))
  try:
    num_kept = len(kept_rows(index.num_rows, source.sampling_strategy, source.seed))
  except InputError as error:
    raise InputError(f"{source.json_path}: {error}") from error
  start = parts_before[-1].rows.stop if parts_before else 0
  return _Part(source, index, range(start, start + num_kept))


@dataclasses.dataclass(frozen=True)
class _Part:
  """The rows of one source; `rows` are their indices in the mixture."""

  source: Source
  index: RowIndex
  rows: range

  @functools.cached_property
  def numbers(self) -> range | np.ndarray:
    """The indices, in the annotation file, of the kept rows."""
    return kept_rows(self.index.num_rows, self.source.sampling_strategy, self.source.seed)

  @functools.cached_property
  def table(self) -> np.ndarray:
    """The index of the annotation file, mapped into memory; see `RowIndex.table`."""
    return self.index.table()

  @functools.cached_property
  def text(self) -> TextFile:
    """The annotation file, open."""
    return self.index.open_text()

  @property
  def media_type(self) -> str:
    """What the rows of this source show: of the mixture, or else of the file's first row."""
    return self.source.media_type or self.index.media_type

  def kinds(self) -> np.ndarray:
    """Returns the kind of each row as an index in `KINDS`, integers `[rows]`."""
    if self.media_type in ("image", "video"):
      return np.full(len(self.rows), KINDS.index(self.media_type), np.int8)
    return self.column("kind")

  def column(self, name: str) -> np.ndarray:
    """Returns a column of the index for the kept rows, `[rows]`."""
    whole, numbers = self.table[name], self.numbers
    if isinstance(numbers, range):
      return whole[numbers.start : numbers.stop]
    return whole[numbers]

  def number(self, index: int) -> int:
    """Returns the index, in the annotation file, of a row of the mixture."""
    return int(self.numbers[index - self.rows.start])

  def parse(self, index: int) -> object:
    """Returns a row as it is in the file, or None if it is not JSON.

    Raises:
      InputError: the annotation file can no longer be read, or has changed.
    """
    try:
      record = self.table[self.number(index)]
      row = parse_row(self.text.read(int(record["start"]), int(record["length"])))
      if not isinstance(row, dict):
        self.text.check_unchanged()
    except OSError as error:
      raise InputError(
        f"{self.source.json_path}: can no longer be read ({error.strerror or error}); restore it, "
        "or its index, and start again"
      ) from error
    return row

  def __getstate__(self):
    return {name: self.__dict__[name] for name in ("source", "index", "rows")}


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a mixture, first all of the first source, and so on; see the module's example."""

  path: str
  _parts: tuple[_Part, ...]
  max_frames: int

  def __len__(self) -> int:
    return self._parts[-1].rows.stop

  def __getitem__(self, index: int) -> dict:
    """Reads and checks a row; its media have full paths.

    Raises:
      BrokenRow: the row cannot be used; the message begins with the reason and names file and row.
      InputError: the annotation file is missing or has changed, so that none of its rows can be
        read.
    """
    part = self._part(index)
    try:
      return _checked(part.parse(index), part)
    except BrokenRow as error:
      where = f"{part.source.json_path} row {part.number(index) + 1}"
      raise BrokenRow(error.reason, f"{where}: {error.detail}") from error

  def kind(self, index: int) -> str:
    """Returns what a row shows: "video", "image" or "text"; for a broken row, what its file has."""
    part = self._part(index)
    if part.media_type in ("image", "video"):
      return part.media_type
    return KINDS[part.table["kind"][part.number(index)]]

  def has(self, kind: str) -> bool:
    """Returns whether any row is of this kind."""
    return any((part.kinds() == KINDS.index(kind)).any() for part in self._parts)

  def draw_of_kind(self, kind: str, most: int, rng: np.random.Generator) -> list[int]:
    """Draws different rows of a kind from the whole mixture, at most `most` and at most all."""
    same = [
      np.flatnonzero(part.kinds() == KINDS.index(kind)) + part.rows.start for part in self._parts
    ]
    same = np.concatenate(same)
    return rng.choice(same, min(most, len(same)), replace=False).tolist()

  def media(self, index: int) -> list[str]:
    """Returns the full paths of a row's media; no path for a row that cannot be used."""
    with contextlib.suppress(BrokenRow):
      row = self[index]
      kind = kind_of(row)
      return media_paths(row, kind) if kind != "text" else []
    return []

  def source(self, index: int) -> str:
    """Returns the path of the annotation file that holds a row."""
    return self._part(index).source.json_path

  def label(self, index: int) -> str:
    """Returns a row's name: its id or its first medium, else its number in the file, from 1.

    It is the number also if the file can no longer be read: messages need a name.
    """
    part, row = self._part(index), None
    with contextlib.suppress(InputError):
      row = part.parse(index)
    row = row if isinstance(row, dict) else {}
    for name in (row.get("id"), row.get("video"), row.get("image")):
      if isinstance(name, list) and name:
        name = name[0]
      if isinstance(name, str | int) and name != "":
        return one_line(name)
    return f"row {part.number(index) + 1}"

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Estimated length of every row, int32 `[N]`: its words, and those that its media count for."""
    extra = np.array([media_length(kind, self.max_frames) for kind in KINDS], np.int32)
    return np.concatenate([part.column("words") + extra[part.kinds()] for part in self._parts])

  def words(self, index: int) -> int:
    """Returns how many words the conversations of a row have."""
    part = self._part(index)
    return int(part.table["words"][part.number(index)])

  def index_bytes(self) -> int:
    """Returns how many bytes the indices take on the disk."""
    folders = {part.index.directory for part in self._parts}
    return sum(file.stat().st_size for folder in folders for file in Path(folder).iterdir())

  @property
  def weights(self) -> list[float]:
    """How often the rows of each source are seen in an epoch."""
    return [part.source.weight for part in self._parts]

  @property
  def sources(self) -> list[Source]:
    """The sources, in their order."""
    return [part.source for part in self._parts]

  @property
  def source_ranges(self) -> list[tuple[int, int]]:
    """For each source, the index of its first row and the index after its last row."""
    return [(part.rows.start, part.rows.stop) for part in self._parts]

  @property
  def fingerprint(self) -> str:
    """A digest that is the same for the same rows and settings, wherever the files are."""
    facts = [self.max_frames]  # the lengths depend on it, and the order on the lengths
    for part in self._parts:
      settings = dataclasses.asdict(part.source)
      for path in ("json_path", "data_root", "folder"):
        del settings[path]
      # The rows that `random` keeps may change with the version of NumPy.
      first_kept = [int(number) for number in part.numbers[:_NUM_IN_FINGERPRINT]]
      facts.append([part.index.digest, settings, first_kept])
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

  def _part_number(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    return bisect_right([part.rows.start for part in self._parts], index) - 1

  def _part(self, index):
    return self._parts[self._part_number(index)]

  def __getstate__(self):
    return {name: self.__dict__[name] for name in ("path", "_parts", "max_frames")}


def _checked(row: object, part: _Part) -> dict:
  """Returns a row with full paths, after all checks that need no media."""
  check_object(row)
  source = part.source
  if part.media_type in ("image", "video"):
    folder, kind = source.data_root or source.folder, part.media_type
  else:  # as in the original, the paths are not relative to data_root
    folder, kind = source.folder, kind_of(row)
  confined = folder == source.data_root
  row = with_full_paths(row, kind, folder, source.video_read_type, confined)
  check_row(row)
  return row
