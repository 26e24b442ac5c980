"""A file of small records that only grows; each record is found by a digest of 16 bytes.

  entries = RecordFile(folder / "entries", [("first", "<i8"), ("clips", "<i8")])
  entries.append({digest: (0, 25)})
  entries.find(digest)             # (0, 25)

A million records take tens of megabytes of memory and are loaded in a moment. A record exists once
all of it is written. If a process was killed while it wrote a record, the next record overwrites
the incomplete one.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class RecordFile:
  """The records that a file had when it was opened, and those appended since then.

  Attributes:
    records: the records of the opened file, a structured array `[records]`, in no useful order.
  """

  def __init__(self, path: Path, fields: Sequence[tuple[str, str]]):
    """Reads the file, if there is one.

    Args:
      path: of the file.
      fields: name and NumPy type of each field of a record.
    """
    self._path, self._dtype = path, np.dtype([("digest", "<u8", (2,)), *fields])
    count = path.stat().st_size // self._dtype.itemsize if path.exists() else 0
    records = np.fromfile(path, self._dtype, count) if count else np.empty(0, self._dtype)
    # After a power failure the file may end with zeros that nobody wrote.
    (empty,) = np.nonzero(~records["digest"].any(axis=1))
    records = records[: empty[0] if len(empty) else count]
    self.records = records[np.argsort(records["digest"][:, 0])]
    self._halves = np.ascontiguousarray(self.records["digest"][:, 0])
    self._new: dict[bytes, tuple] = {}

  def __len__(self) -> int:
    return len(self.records) + len(self._new)

  def find(self, digest: bytes) -> tuple | None:
    """Returns the fields of the record with this digest, or None."""
    if digest in self._new:
      return self._new[digest]
    half = np.frombuffer(digest, "<u8")[0]
    start, stop = (np.searchsorted(self._halves, half, side) for side in ("left", "right"))
    for record in self.records[start:stop]:
      if record["digest"].tobytes() == digest:
        return record.item()[1:]
    return None

  def append(self, values: Mapping[bytes, tuple]) -> None:
    """Adds records; they are on the disk when it returns. Only one process at a time may do so."""
    if not values:
      return
    records = np.array(
      [(np.frombuffer(digest, "<u8"), *fields) for digest, fields in values.items()], self._dtype
    )
    with open(self._path, "r+b" if self._path.exists() else "wb") as file:
      file.truncate(len(self) * self._dtype.itemsize)
      file.seek(0, os.SEEK_END)
      file.write(records.tobytes())
      file.flush()
      os.fsync(file.fileno())
    self._new |= values
