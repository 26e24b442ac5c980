"""The rows of a mixture, millions of them, read one at a time.

  rows = open_rows(read_mixture("stage3.yaml"))
  len(rows), rows.kind(7)       # 3_412_087, "video"
  rows[7]                       # {"video": "/data/videos/a.mp4", "conversations": [...]}

What is known of a row before it is read (kind, words) lies in small files mapped into memory, see
row_index.py. `Rows` itself holds paths only: a worker process gets it in a few kilobytes, and opens
the files when it needs them.
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

from videochat_flash_jax.data.mixture.annotations import (
  kept_rows,
  kind_of,
  media_length,
  media_paths,
  with_whole_paths,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.mixture import Mixture, Source
from videochat_flash_jax.data.mixture.row_check import check_object, check_row
from videochat_flash_jax.data.mixture.row_index import KINDS, RowIndex, TextFile, row_index
from videochat_flash_jax.data.mixture.row_text import parse_row
from videochat_flash_jax.errors import InputError, one_line

_NUM_TOLD = 100  # rows of a source that its fingerprint names


def rows_cache() -> Path:
  """Where indices are kept: `VCF_CACHE_DIR`, or ~/.cache/vcflash, and there `rows`."""
  return Path(os.environ.get("VCF_CACHE_DIR", Path.home() / ".cache" / "vcflash")) / "rows"


def open_rows(
  mixture: Mixture, cache_dir: str | os.PathLike | None = None, max_frames: int = 512
) -> "Rows":
  """Opens the rows of a mixture; indexes annotation files that were never opened before.

  Args:
    mixture: of `read_mixture`.
    cache_dir: of the indices; by default `rows_cache`.
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
  """As `open_rows`, but for the sources of which no row can be read.

  Returns:
    The rows of all others, None if there are none; and of each of those, why.
  """
  parts, problems = [], {}
  for source in mixture.sources:
    try:
      parts.append(_open_part(source, cache_dir, parts))
    except InputError as error:
      problems[source] = str(error)
  return Rows(mixture.path, tuple(parts), max_frames=512) if parts else None, problems


def _open_part(source, cache_dir, parts_before) -> "_Part":
  index = row_index(source.json_path, Path(cache_dir or rows_cache()))
  try:
    num_kept = len(kept_rows(index.num_rows, source.sampling_strategy, source.seed))
  except InputError as error:
    raise InputError(f"{source.json_path}: {error}") from error
  start = parts_before[-1].rows.stop if parts_before else 0
  return _Part(source, index, range(start, start + num_kept))


@dataclasses.dataclass(frozen=True)
class _Part:
  """One source's rows; `rows` are their numbers in the mixture."""

  source: Source
  index: RowIndex
  rows: range

  @functools.cached_property
  def numbers(self) -> range | np.ndarray:
    """Numbers in the file of the rows kept."""
    return kept_rows(self.index.num_rows, self.source.sampling_strategy, self.source.seed)

  @functools.cached_property
  def table(self) -> np.ndarray:
    return self.index.table()

  @functools.cached_property
  def text(self) -> TextFile:
    return self.index.open_text()

  @property
  def media_type(self) -> str:
    return self.source.media_type or self.index.media_type

  def kinds(self) -> np.ndarray:
    """Place in `KINDS` of each row's kind."""
    if self.media_type in ("image", "video"):
      return np.full(len(self.rows), KINDS.index(self.media_type), np.int8)
    return self.column("kind")

  def column(self, name: str) -> np.ndarray:
    """A column of the index, of the rows kept."""
    whole, numbers = self.table[name], self.numbers
    if isinstance(numbers, range):
      return whole[numbers.start : numbers.stop]
    return whole[numbers]

  def number(self, index: int) -> int:
    """Number in the file of a row of the mixture."""
    return int(self.numbers[index - self.rows.start])

  def parse(self, index: int) -> object:
    """A row as it is written, None if that is no JSON.

    Raises:
      InputError: the annotation file cannot be read any more, or has changed.
    """
    try:
      record = self.table[self.number(index)]
      row = parse_row(self.text.read(int(record["start"]), int(record["length"])))
      if not isinstance(row, dict):
        self.text.check_unchanged()
    except OSError as error:
      raise InputError(
        f"{self.source.json_path}: cannot be read any more ({error.strerror or error}); put it, or "
        "its index, back and start again"
      ) from error
    return row

  def __getstate__(self):
    return {name: self.__dict__[name] for name in ("source", "index", "rows")}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of a mixture, those of its sources one after the other; see the module's example."""

  path: str
  _parts: tuple[_Part, ...]
  max_frames: int

  def __len__(self) -> int:
    return self._parts[-1].rows.stop

  def __getitem__(self, index: int) -> dict:
    """Reads a row, checked, with whole paths of its media.

    Raises:
      BrokenRow: it cannot be used; the message begins with the reason and names file and row.
      InputError: the annotation file is gone or has changed, and with it all its rows.
    """
    part = self._part(index)
    try:
      return _checked(part.parse(index), part)
    except BrokenRow as error:
      where = f"{part.source.json_path} row {part.number(index) + 1}"
      raise BrokenRow(error.reason, f"{where}: {error.detail}") from error

  def kind(self, index: int) -> str:
    """What a row shows: "video", "image" or "text"; of a broken one, what its file has."""
    part = self._part(index)
    if part.media_type in ("image", "video"):
      return part.media_type
    return KINDS[part.table["kind"][part.number(index)]]

  def has(self, kind: str) -> bool:
    """Whether any row is of this kind."""
    return any((part.kinds() == KINDS.index(kind)).any() for part in self._parts)

  def draw_of_kind(self, kind: str, most: int, rng: np.random.Generator) -> list[int]:
    """Different rows of a kind from anywhere in the mixture, all of them if there are no more."""
    same = [
      np.flatnonzero(part.kinds() == KINDS.index(kind)) + part.rows.start for part in self._parts
    ]
    same = np.concatenate(same)
    return rng.choice(same, min(most, len(same)), replace=False).tolist()

  def media(self, index: int) -> list[str]:
    """Whole paths of a row's media; none of a row that cannot be used."""
    with contextlib.suppress(BrokenRow):
      row = self[index]
      kind = kind_of(row)
      return media_paths(row, kind) if kind != "text" else []
    return []

  def source(self, index: int) -> str:
    """Path of the annotation file that a row is from."""
    return self._part(index).source.json_path

  def label(self, index: int) -> str:
    """A row's name: its id or first medium, or else its number in the file, from 1.

    The latter also where the file cannot be read any more: messages need names.
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
    """Estimated length of every row, int32 [N]: words, and those that its media count for."""
    extra = np.array([media_length(kind, self.max_frames) for kind in KINDS], np.int32)
    return np.concatenate([part.column("words") + extra[part.kinds()] for part in self._parts])

  def words(self, indices: range) -> np.ndarray:
    """Words of the conversations of rows that follow one another in one source."""
    part = self._part(indices.start)
    return part.column("words")[indices.start - part.rows.start :][: len(indices)]

  def index_bytes(self) -> int:
    """What the indices take on the disk."""
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
    """First row of each source, and the one after its last."""
    return [(part.rows.start, part.rows.stop) for part in self._parts]

  @property
  def fingerprint(self) -> str:
    """Tells mixtures apart: the same for the same rows and settings, wherever they lie."""
    facts = [self.max_frames]  # it decides the lengths, and these the order
    for part in self._parts:
      settings = dataclasses.asdict(part.source)
      for place in ("json_path", "data_root", "folder"):
        del settings[place]
      # Which rows `random` keeps is NumPy's to say, and may change with it.
      facts.append([part.index.digest, settings, [int(n) for n in part.numbers[:_NUM_TOLD]]])
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
  """A row with whole paths, of which all is right that can be told without its media."""
  check_object(row)
  source = part.source
  if part.media_type in ("image", "video"):
    folder, kind = source.data_root or source.folder, part.media_type
  else:  # as in the original, not below data_root
    folder, kind = source.folder, kind_of(row)
  confined = folder == source.data_root
  row = with_whole_paths(row, kind, folder, source.video_read_type, confined)
  check_row(row)
  return row
