"""An index of an annotation file: where each row begins, its kind and its number of words.

A file of any size is read once, in pieces, and its index is kept in a cache. Later starts map the
index into memory and parse nothing. There a row takes 17 bytes, which all processes of a machine
share. The text of the rows stays in the annotation file. If that file is at an address, a copy of
it is kept beside the index.

  cache/3f0c.../rows.npy    start and length in bytes, words, kind: one record a row
                facts.json  facts about all rows together
                text        copy of a file that is not on this machine
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.media.files import copy_file, file_stamp, is_address
from videochat_flash_jax.data.mixture.annotations import kind_of, length_in_words
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.row_text import rows_of_file
from videochat_flash_jax.errors import InputError, one_line

KINDS = ("text", "image", "video")
_VERSION = 2
_SCRATCH = "building-"
_DAY_SECONDS = 24 * 3600
_RECORD = np.dtype([("start", "<i8"), ("length", "<i4"), ("words", "<i4"), ("kind", "i1")])
_pack_record = struct.Struct("<qiib").pack  # the same layout, and faster for a single record


@dataclass(frozen=True)
class RowIndex:
  """The index of an annotation file, on the disk.

  Attributes:
    directory: folder of the index.
    text: the file that holds the rows' bytes.
    stamp: size and time of `text` when it was read; if they differ, the file has changed.
    num_rows: number of rows in the file, broken rows included.
    media_type: what the first readable row has: "image", "video" or "text".
    digest: digest of all rows; the same for the same rows, wherever the file is.
  """

  directory: str
  text: str
  stamp: tuple[int, int]
  num_rows: int
  media_type: str
  digest: str

  def table(self) -> np.ndarray:
    """Maps the records into memory, a structured array `[num_rows]`.

    The fields of a record are start and length (in bytes), words, and kind (an index in `KINDS`).
    """
    return np.load(Path(self.directory) / "rows.npy", mmap_mode="r")

  def open_text(self) -> "TextFile":
    """Opens the file that holds the rows.

    Raises:
      InputError: the file has changed since its index was made.
      OSError: the file can no longer be read.
    """
    file = TextFile(self.text, self.stamp)
    file.check_unchanged()
    return file


class TextFile:
  """An open file that several threads can read parts of; closed when no longer used."""

  def __init__(self, path: str, stamp: tuple[int, int]):
    self._path, self._stamp = path, stamp
    self._descriptor = os.open(path, os.O_RDONLY)

  def check_unchanged(self) -> None:
    """Raises an `InputError` if other bytes were written into the file.

    It does not matter if the file was replaced or removed, because the old one is still open.
    """
    status = os.fstat(self._descriptor)
    if (status.st_size, status.st_mtime_ns) != tuple(self._stamp):
      raise InputError(f"{self._path}: has changed since the rows were opened; start again")

  def read(self, start: int, length: int) -> bytes:
    """Reads `length` bytes from byte `start` on, fewer at the end of the file."""
    return os.pread(self._descriptor, length, start)

  def __del__(self):
    if hasattr(self, "_descriptor"):
      os.close(self._descriptor)


def row_index(json_path: str, cache_dir: Path) -> RowIndex:
  """Returns the index of an annotation file, and makes it if the cache does not have it.

  Several processes may do this at the same time: each makes its own index, and the first one is
  kept. If a server does not report whether a file has changed, the file is copied at each start.

  Raises:
    InputError: the file cannot be read or holds no row, it changes while it is read, or the cache
      cannot be used.
  """
  stamp = _stamp(json_path)
  directory = _directory(cache_dir, json_path, stamp)
  shows_changes = bool(stamp[1])
  try:
    if shows_changes and (index := _open_index(directory, json_path, stamp)):
      return index
    os.makedirs(cache_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=_SCRATCH) as scratch:
      new = Path(scratch, "index")
      new.mkdir()
      digest = _make_index(json_path, new)["digest"]
      if _stamp(json_path) != stamp:
        raise InputError(f"{json_path}: changes while it is read; start again when it is complete")
      if not shows_changes:
        directory = _directory(cache_dir, json_path, (*stamp, digest))
      _move_into_cache(new, directory, json_path, stamp)
    index = _open_index(directory, json_path, stamp)
  except OSError as error:
    raise InputError(
      f"{error.filename or cache_dir}: cannot be written or read ({error.strerror or error}); "
      "free some disk space, or set VCF_CACHE_DIR to another folder"
    ) from error
  if index is None:
    raise InputError(f"{directory}: the index is damaged again after it was made; check the disk")
  return index


def remove_leftovers(cache_dir: Path) -> None:
  """Removes unfinished indices that killed processes left in the cache more than a day ago."""
  for folder in cache_dir.glob(f"{_SCRATCH}*"):
    with contextlib.suppress(OSError):  # another process may have removed it already
      if time.time() - folder.stat().st_mtime > _DAY_SECONDS:
        shutil.rmtree(folder)


def _stamp(json_path):
  try:
    return file_stamp(json_path)
  except OSError as error:
    raise _unreadable(json_path, error) from error


def _directory(cache_dir, json_path, stamp):
  key = hashlib.blake2b(json.dumps([_VERSION, json_path, *stamp]).encode(), digest_size=16)
  return Path(cache_dir) / key.hexdigest()


def _open_index(directory, json_path, json_stamp) -> RowIndex | None:
  """Opens the index in a directory; returns None if there is none, or if it is damaged."""
  text = directory / "text" if is_address(json_path) else json_path
  try:
    facts = json.loads((directory / "facts.json").read_text())
    stamp = file_stamp(text) if is_address(json_path) else json_stamp
    index = RowIndex(str(directory), str(text), stamp, **facts)
    table = index.table()
    end = int(table["start"][-1]) + int(table["length"][-1])
  except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, TypeError, IndexError):
    return None
  return index if len(table) == index.num_rows and end <= stamp[0] else None


def _move_into_cache(new, directory, json_path, stamp):
  """Moves a new index to its directory, after all of it is on the disk: power may fail."""
  for path in (*new.iterdir(), new):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  try:
    new.rename(directory)
  except OSError:
    if _open_index(directory, json_path, stamp) is None:  # else another process was faster
      shutil.rmtree(directory, ignore_errors=True)
      new.rename(directory)


def _unreadable(json_path, error):
  problem = getattr(error, "strerror", None) or str(error).split("\n")[0]
  return InputError(f"{json_path}: cannot be read ({problem}); check the path")


def _make_index(json_path, directory):
  """Writes the index of a file into a directory, and returns the facts of facts.json."""
  text = json_path
  if is_address(json_path):
    text = directory / "text"
    try:
      copy_file(json_path, text)
    except OSError as error:
      raise _unreadable(json_path, error) from error
  try:
    file = open(text, "rb")  # noqa: SIM115
    file.peek(1)  # a folder can be opened, but not read
  except OSError as error:
    raise _unreadable(json_path, error) from error
  digest, media_type, records = hashlib.blake2b(digest_size=16), None, bytearray()
  problem = ""  # of the first row that cannot be used
  bar = tqdm(
    desc=f"indexing {one_line(os.path.basename(json_path))}",
    total=os.path.getsize(text),
    unit="B",
    unit_scale=True,
    leave=False,
    disable=None,
  )
  with file, bar:
    for start, raw, row in rows_of_file(file, json_path):
      kind = kind_of(row) if isinstance(row, dict) else "text"
      if isinstance(row, dict):
        media_type = media_type or kind
      elif isinstance(row, BrokenRow) and not problem:
        problem = f" (row {len(records) // _RECORD.itemsize + 1}: {row.detail})"
      digest.update(raw)
      digest.update(b"\n")
      records += _pack_record(start, len(raw), _num_words(row), KINDS.index(kind))
      bar.update(start + len(raw) - bar.n)
  if media_type is None:
    raise InputError(
      f"{json_path}: holds no row{problem}; give a JSON list of objects, or one object on each line"
    )
  np.save(directory / "rows.npy", np.frombuffer(records, _RECORD))
  num_rows = len(records) // _RECORD.itemsize
  facts = {"num_rows": num_rows, "media_type": media_type, "digest": digest.hexdigest()}
  (directory / "facts.json").write_text(json.dumps(facts))
  return facts


def _num_words(row):
  try:
    return length_in_words(row)
  except (TypeError, KeyError, AttributeError):  # the conversations cannot be used
    return 0
