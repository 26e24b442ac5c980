"""Reads another row of the same kind instead of one that cannot be read.

So rows that cannot be read do not stop a run:

  example 17 is row 204, a video:   204 unreadable video, 5310 missing file, 87 is read

Rows about the same video are often neighbours, so the replacement is drawn from the whole mixture:
rows are tried in an order that depends only on the seed, the stream and the number of the example.
The example carries a list of the skipped rows, so that the main process can count and log them. A
resumed run reads the same row again, here 87, even if row 204 was repaired in the meantime.
"""

import errno
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.data.batches.examples import Example, ExampleReader
from videochat_flash_jax.data.mixture.broken import BrokenRow, any_error_breaks
from videochat_flash_jax.errors import InputError

_MAX_REPLACEMENTS = 100
_MEDIA_REASONS = {"missing file", "unreadable video", "unreadable image", "no frames"}
_REPLACEMENT_SEED = 1  # so that these draws differ from those for the example itself
_RETRY_SECONDS = 0.2, 1.0
_TEMPORARY = {  # errors of a network or a busy machine, which may be gone at the next try
  getattr(errno, name)
  for name in (
    "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EINTR", "EIO",
    "EMFILE", "ENETDOWN", "ENETUNREACH", "ENFILE", "ENOBUFS", "ESTALE", "ETIMEDOUT",
  )
}  # fmt: skip


class SkippedRow(NamedTuple):
  """A row that could not be used.

  Attributes:
    row: its number in the mixture.
    source: the file it comes from.
    label: its name in that file.
    reason: one of `broken.REASONS`.
    message: the whole error message.
  """

  row: int
  source: str
  label: str
  reason: str
  message: str


class Drawn(NamedTuple):
  """An example and the row it was read from.

  Attributes:
    example: the example.
    row: the number of its row in the mixture.
    skipped: the rows that were tried before this one and could not be used: first the row drawn
      for this example, then its replacements. Empty if the drawn row itself was read.
    damaged: source and name of the row, if its video is damaged but could be read.
    cut: source and name of the row, if words of its answers do not fit into a training row.
    digest: of the example, where several processes read the stream; see `shared_stream`.
  """

  example: Example
  row: int
  skipped: tuple[SkippedRow, ...] = ()
  damaged: str | None = None
  cut: tuple[str, str] | None = None
  digest: str = ""


class Reader(Protocol):
  """Reads the n-th example of a stream: a `ReplacingReader` or a `SyntheticReader`."""

  def read(
    self, stream: int, number: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Reads example `number` of a stream, but none of the rows in `unusable`."""

  def read_row(self, stream: int, number: int, row: int) -> Drawn:
    """Reads example `number` from this row; raises `BrokenRow` if that is not possible."""

  def read_again(
    self, stream: int, number: int, row: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Reads example `number` again, from the `row` that was read for it before."""


class ReplacingReader:
  """Reads the n-th example of a stream, with replacements for rows that cannot be read."""

  def __init__(self, rows, reader: ExampleReader, order: ExampleOrder, seed: int):
    """Stores the settings; nothing is read yet.

    Args:
      rows: the rows of the mixture.
      reader: reads one row.
      order: says which row is which example.
      seed: seed of everything that is drawn for an example.
    """
    self._rows, self._reader, self._order, self._seed = rows, reader, order, seed

  def read(
    self, stream: int, number: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Reads example `number` of a stream, or its replacement.

    Args:
      stream: the stream.
      number: of the example.
      unusable: rows that are skipped although they could be read here, and the reasons.

    Raises:
      InputError: neither the row nor any of a hundred other rows of its kind can be read.
    """
    skipped, broken_media = [], set()
    for row in self._candidates(stream, number):
      if not broken_media.isdisjoint(self._rows.media(row) if broken_media else ()):
        continue
      try:
        if unusable and row in unusable:
          raise unusable[row]
        return self.read_row(stream, number, row)._replace(skipped=tuple(skipped))
      except BrokenRow as error:
        names = self._rows.source(row), self._rows.label(row)
        skipped.append(SkippedRow(row, *names, error.reason, str(error)))
        if error.reason in _MEDIA_REASONS:
          broken_media.update(self._rows.media(row))
    raise InputError(
      f"neither a row nor any of its replacements can be read: {len(skipped)} were tried, the "
      f"first one failed because of {skipped[0].message}; fix them: vcflash data check lists them"
    )

  def _candidates(self, stream, number) -> Iterator[int]:
    """The row itself, then other rows of its kind in the order in which they are tried."""
    row = self._order.row(stream, number)
    yield row
    rng = np.random.default_rng([self._seed, stream, number, _REPLACEMENT_SEED])
    others = self._rows.draw_of_kind(self._rows.kind(row), 1 + _MAX_REPLACEMENTS, rng)
    yield from (other for other in others if other != row)

  def read_again(
    self, stream: int, number: int, row: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Reads example `number` of a stream again, from the row that was read for it before.

    Raises:
      InputError: that row cannot be read any more, or is in `unusable`.
    """
    try:
      if unusable and row in unusable:
        raise unusable[row]
      return self.read_row(stream, number, row)
    except BrokenRow as error:
      raise InputError(
        f"{self._rows.source(row)}, {self._rows.label(row)} was read before the run was saved, but "
        f"cannot be read now: {error}; restore it, or start without the state of the batches"
      ) from error

  def read_row(self, stream: int, number: int, row: int) -> Drawn:
    """Reads example `number` of a stream from this row.

    Raises:
      BrokenRow: that row cannot be read.
    """
    rng = np.random.default_rng([self._seed, stream, number])
    example = self._read_with_retries(row, rng)
    damaged = cut = None
    if example.is_damaged or example.is_cut:
      names = self._rows.source(row), self._rows.label(row)
      damaged = ", ".join(names) if example.is_damaged else None
      cut = names if example.is_cut else None
    return Drawn(example, row, damaged=damaged, cut=cut)

  def _read_with_retries(self, row, rng) -> Example:
    """Reads a row; tries again after an error that may be temporary."""
    for seconds in (*_RETRY_SECONDS, None):
      try:
        with any_error_breaks(self._rows.kind(row)):
          return self._reader.read(self._rows[row], rng)
      except InputError as error:
        if seconds is None or not may_pass(error):
          raise
      time.sleep(seconds)
    raise AssertionError("unreachable")


def may_pass(error: BaseException | None) -> bool:
  """Returns whether an error, or its cause, is temporary: the same call may succeed later."""
  if error is None:
    return False
  is_temporary = isinstance(error, OSError) and error.errno in _TEMPORARY
  return (
    is_temporary or isinstance(error, TimeoutError | ConnectionError) or may_pass(error.__cause__)
  )
