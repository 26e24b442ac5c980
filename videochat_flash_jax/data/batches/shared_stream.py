"""Makes all processes that read a stream take the same examples from it.

If the tokens of a row are split over devices of several processes, each of them reads and packs the
whole row. One example that differs, such as a stand-in for a file that one process could not read,
would change most of the rows that this process packs later. So before an example is packed, the
processes tell each other which row each has read for it, with a digest of what was read. The first
process decides: all take its row. If another one cannot, all take the next row that the first
process can read.

                 process 0          process 1
  example 17     reads row 204      reads row 87, since row 204 cannot be read
  row 204                           tries again, in vain
  row 87         reads it           has read the same: both take it

When a batch is packed, they compare a digest of its rows. No file can make these differ, so a
difference is a fault of software or a machine, and ends the run.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from videochat_flash_jax.data.batches.replacement import Drawn, Reader, SkippedRow
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_REMEDY = (
  "start all processes again with the same command, to continue from the newest checkpoint; if it "
  "happens again, compare the files and the software of these hosts"
)


class Peers(Protocol):
  """The processes that read a stream, such as a `parallel.exchange.Exchange`.

  Attributes:
    processes: their numbers, the same on all of them; the first one decides.
    here: the number of this process.
  """

  processes: Sequence[int]
  here: int

  def tell(self, text: str) -> list[str]:
    """Tells the others a text; returns the texts of all, in the order of `processes`."""


class Sharing(Protocol):
  """Says which streams of this process other processes read, too.

  Attributes:
    unit: what a batch is for: "step" in "step 17".
  """

  unit: str

  def begin(self) -> Mapping[int, Peers]:
    """Returns the peers of each shared stream, who have told each other nothing yet.

    All processes must call this equally often.
    """


class _Reading(NamedTuple):
  """What a process tells about an example.

  Attributes:
    row: the row that it has read; -1 if it could not.
    digest: of the example.
    skipped: `Drawn.skipped`.
    broken: reason and detail, if it could not read the row that the first process has read.
    error: the message of an error that ends the run.
  """

  row: int = -1
  digest: str = ""
  skipped: Sequence[Sequence[Any]] = ()
  broken: Sequence[str] = ()
  error: str = ""


class SharedStream:
  """A stream that several processes read, as one of them sees it."""

  def __init__(self, reader: Reader, stream: int, peers: Peers):
    """Stores the arguments; nothing is read or told yet."""
    self._reader, self._stream, self._peers = reader, stream, peers
    self._batch = ""

  def begin_batch(self, name: str):
    """Notes the name of the next batch, such as "step 17", for errors."""
    self._batch = name

  def take(
    self,
    number: int,
    draw: Callable[[], Drawn],
    draw_other: Callable[[Mapping[int, BrokenRow]], Drawn],
  ) -> Drawn:
    """Returns an example that is the same on all processes; all of them must call this.

    Args:
      number: of the example.
      draw: returns what this process has read ahead, with its digest.
      draw_other: returns another row. Its argument has the rows that must not be used, and why.

    Raises:
      InputError: `draw` or `draw_other` has raised it, here or in another process; or another
        process is at another place in the stream.
    """
    place, unusable = f"example {number}", {}
    drawn, own = self._try(draw)
    readings = self._tell_readings(place, own)
    while not _are_equal(readings):
      row = readings[0].row
      if not _are_equal((own, readings[0])):
        self._log_retry(own, row)
        drawn, own = self._try(functools.partial(self._read_row, number, row))
      readings = self._tell_readings(place, own)
      if not _are_equal(readings):
        unusable[row] = self._why_unusable(readings)
        if self._peers.here == self._peers.processes[0]:
          drawn, own = self._try(lambda: with_digest(draw_other(unusable)))
        readings = self._tell_readings(place, own)
    return drawn._replace(skipped=tuple(SkippedRow(*row) for row in readings[0].skipped))

  def check_rows(self, digest: str):
    """Compares the packed rows of a batch by their digest; all processes must call this.

    Raises:
      InputError: they differ.
    """
    digests = self._tell("packed rows", digest)
    self._check_equal(digests, "have packed different ones")

  def _try(self, draw):
    """Returns what `draw` returns, or None if it fails, and what is to be told about it."""
    try:
      drawn = draw()
    except BrokenRow as error:
      return None, _Reading(broken=(error.reason, error.detail))
    except InputError as error:
      return None, _Reading(error=str(error))
    return drawn, _Reading(drawn.row, drawn.digest, drawn.skipped)

  def _read_row(self, number, row) -> Drawn:
    return with_digest(self._reader.read_row(self._stream, number, row))

  def _tell_readings(self, place, own) -> list[_Reading]:
    """Tells a reading; returns those of all, if none of them is an error."""
    readings = [_Reading(*fields) for fields in self._tell(place, own)]
    for process, reading in zip(self._peers.processes, readings, strict=True):
      if reading.error:
        is_own = process == self._peers.here
        raise InputError(reading.error if is_own else f"process {process}: {reading.error}")
    return readings

  def _tell(self, place, value) -> list[Any]:
    """Tells a value; returns those of all processes, which must be at the same place."""
    texts = self._peers.tell(json.dumps([place, value]))
    places, values = zip(*map(json.loads, texts), strict=True)
    self._check_equal(places, f"are at different places ({', '.join(sorted(set(places)))})")
    return list(values)

  def _check_equal(self, values, found):
    """Raises an `InputError` with what was `found`, unless all processes have the same value."""
    pairs = zip(self._peers.processes, values, strict=True)
    others = [str(process) for process, value in pairs if value != values[0]]
    if others:
      names = " and ".join([str(self._peers.processes[0]), ", ".join(others)])
      raise InputError(f"{self._batch}: processes {names} share rows, but {found}; {_REMEDY}")

  def _why_unusable(self, readings) -> BrokenRow:
    """Why not all processes can use the row that the first one has read."""
    first = self._peers.processes[0]
    for process, reading in zip(self._peers.processes, readings, strict=True):
      if reading.broken:
        reason, detail = reading.broken
        return BrokenRow(reason, f"process {process}: {detail}")
      if not _are_equal((reading, readings[0])):
        detail = f"process {process} reads other frames or tokens than process {first}"
        return BrokenRow(
          "differs between hosts", f"{detail}; give all hosts the same files and software"
        )
    raise AssertionError("unreachable")

  def _log_retry(self, own, row):
    """Logs that the first process has read a row which this one has skipped."""
    first = self._peers.processes[0]
    for skipped in (SkippedRow(*fields) for fields in own.skipped):
      if skipped.row == row:
        _log.warning(
          "process %d tries %s, %s again, which process %d has read: %s",
          self._peers.here, skipped.source, skipped.label, first, skipped.message,
        )  # fmt: skip


def _are_equal(readings: Sequence[_Reading]) -> bool:
  return len({(reading.row, reading.digest) for reading in readings}) == 1


def with_digest(drawn: Drawn) -> Drawn:
  """Adds the digest of its example."""
  return drawn._replace(digest=digest(*drawn.example))


def digest(*values: np.typing.ArrayLike) -> str:
  """Returns a text that differs if arrays differ in shape, type or content."""
  hashed = hashlib.sha256()
  for array in map(np.ascontiguousarray, values):
    hashed.update(f"{array.shape} {array.dtype} ".encode())
    hashed.update(array.view(np.uint8).data)
  return hashed.hexdigest()[:32]
