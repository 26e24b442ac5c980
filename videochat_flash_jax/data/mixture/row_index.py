"""An index of an annotation file: where each row stands, its kind and its number of words.

A file is walked through once, in pieces, whatever its size, and the index kept in a cache. Later
starts map it into memory, where a row costs 17 bytes, shared by all processes of a machine, and
nothing is parsed. The rows' text stays in the file (of an address a copy is kept beside the index).

  cache/3f0c.../rows.npy    start and length in bytes, words, kind: one record a row
                facts.json  what the rows are as a whole
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
from videochat_flash_jax.data.mixture.row_text import rows_of_file
from videochat_flash_jax.errors import InputError

KINDS = ("text", "image", "video")
_VERSION = 1
_SCRATCH = "building-"
_DAY_SECONDS = 24 * 3600
_RECORD = np.dtype([("start", "<i8"), ("length", "<i4"), ("words", "<i4"), ("kind", "i1")])
_pack_record = struct.Struct("<qiib").pack  # the same, and quicker for a single one


@dataclass(frozen=True)
class RowIndex:
  """An annotation file's index on the disk.

  Attributes:
    directory: of the index.
    text: the file in which `rows` are bytes.
    stamp: size and time of `text` when it was read; later ones are another file.
    num_rows: of the file, broken ones included.
    media_type: what the first readable row has: "image", "video" or "text".
    digest: of all rows; the same for the same rows, wherever the file lies.
  """

  directory: str
  text: str
  stamp: tuple[int, int]
  num_rows: int
  media_type: str
  digest: str

  def table(self) -> np.ndarray:
    """One record a row, mapped into memory: start, length (bytes), words, kind (of `KINDS`)."""
    return np.load(Path(self.directory) / "rows.npy", mmap_mode="r")

  def open_text(self) -> "TextFile":
    """Opens the file that holds the rows.

    Raises:
      InputError: it is another one than the index was made of.
      OSError: it cannot be read any more.
    """
    file = TextFile(self.text, self.stamp)
    file.check_unchanged()
    return file


class TextFile:
  """Parts of an open file, which is closed with the last use of it; fit for several threads."""

  def __init__(self, path: str, stamp: tuple[int, int]):
    self._path, self._stamp = path, stamp
    self._descriptor = os.open(path, os.O_RDONLY)

  def check_unchanged(self) -> None:
    """Raises an `InputError` if other bytes were written into the file.

    What replaced the file, or removed it, does not matter: it is still open.
    """
    status = os.fstat(self._descriptor)
    if (status.st_size, status.st_mtime_ns) != tuple(self._stamp):
      raise InputError(f"{self._path}: has changed since the rows were opened; start again")

  def read(self, start: int, length: int) -> bytes:
    """Bytes from a place on, fewer at the end."""
    return os.pread(self._descriptor, length, start)

  def __del__(self):
    if hasattr(self, "_descriptor"):
      os.close(self._descriptor)


def row_index(json_path: str, cache_dir: Path) -> RowIndex:
  """The index of an annotation file; makes it if the cache has none of this very file.

  Safe when several processes do so at once: each makes its own, and the first one is kept. Where a
  server does not tell whether a file has changed, it is copied at each start.

  Raises:
    InputError: the file cannot be read or holds no row, it changes meanwhile, or the cache cannot
      be used.
  """
  state = _state(json_path)
  directory = _directory(cache_dir, json_path, state)
  is_known = bool(state[1])
  try:
    if is_known and (index := _kept(directory, json_path, state)):
      return index
    os.makedirs(cache_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=_SCRATCH) as scratch:
      made = Path(scratch, "index")
      made.mkdir()
      digest = _make(json_path, made)["digest"]
      if _state(json_path) != state:
        raise InputError(f"{json_path}: changes while it is read; start again when it is whole")
      if not is_known:
        directory = _directory(cache_dir, json_path, (*state, digest))
      _put(made, directory, json_path, state)
    index = _kept(directory, json_path, state)
  except OSError as error:
    raise InputError(
      f"{error.filename or cache_dir}: cannot be written or read ({error.strerror or error}); "
      "free some room, or set VCF_CACHE_DIR to another folder"
    ) from error
  if index is None:
    raise InputError(f"{directory}: a damaged index, which comes back; check the disk")
  return index


def remove_leftovers(cache_dir: Path) -> None:
  """Removes what processes that were killed while they made an index have left, a day ago."""
  for folder in cache_dir.glob(f"{_SCRATCH}*"):
    with contextlib.suppress(OSError):  # another process may be quicker
      if time.time() - folder.stat().st_mtime > _DAY_SECONDS:
        shutil.rmtree(folder)


def _state(json_path):
  try:
    return file_stamp(json_path)
  except OSError as error:
    raise _unreadable(json_path, error) from error


def _directory(cache_dir, json_path, state):
  key = hashlib.blake2b(json.dumps([_VERSION, json_path, *state]).encode(), digest_size=16)
  return Path(cache_dir) / key.hexdigest()


def _kept(directory, json_path, state) -> RowIndex | None:
  """The index in a directory; None if there is none, or a damaged one."""
  text = directory / "text" if is_address(json_path) else json_path
  try:
    facts = json.loads((directory / "facts.json").read_text())
    stamp = file_stamp(text) if is_address(json_path) else state
    index = RowIndex(str(directory), str(text), stamp, **facts)
    table = index.table()
    end = int(table["start"][-1]) + int(table["length"][-1])
  except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, TypeError, IndexError):
    return None
  return index if len(table) == index.num_rows and end <= stamp[0] else None


def _put(made, directory, json_path, state):
  """Moves a new index to its place, whole on the disk first: power may fail."""
  for path in (*made.iterdir(), made):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  try:
    made.rename(directory)
  except OSError:
    if _kept(directory, json_path, state) is None:  # else another process was faster
      shutil.rmtree(directory, ignore_errors=True)
      made.rename(directory)


def _unreadable(json_path, error):
  problem = getattr(error, "strerror", None) or str(error).split("\n")[0]
  return InputError(f"{json_path}: cannot be read ({problem}); check the path")


def _make(json_path, directory):
  """Writes the index of a file into a directory, and gives its facts."""
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
  bar = tqdm(
    desc=f"indexing {os.path.basename(json_path)}",
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
      digest.update(raw)
      digest.update(b"\n")
      records += _pack_record(start, len(raw), _num_words(row), KINDS.index(kind))
      bar.update(start + len(raw) - bar.n)
  if media_type is None:
    raise InputError(f"{json_path}: holds no row; give a JSON list of objects, or one on each line")
  np.save(directory / "rows.npy", np.frombuffer(records, _RECORD))
  num_rows = len(records) // _RECORD.itemsize
  facts = {"num_rows": num_rows, "media_type": media_type, "digest": digest.hexdigest()}
  (directory / "facts.json").write_text(json.dumps(facts))
  return facts


def _num_words(row):
  try:
    return length_in_words(row)
  except (TypeError, KeyError, AttributeError):  # no conversations that could be used
    return 0
