"""Rows that cannot be read do not stop a run: another one of the same kind stands in.

  example 17 is row 204, a video:   204 unreadable video, 5310 missing file, 87 is read

Rows about one video often stand next to each other, so what stands in comes from anywhere: rows are
tried in an order that depends on seed, stream and number alone. What was passed over travels with
the example, to be counted and logged where the run is. A run that goes on reads the same row again,
here 87, even if 204 is mended by then.
"""

import errno
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.data.batches.examples import Example, ExampleReader
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError, one_line

_MOST_REPLACEMENTS = 100
_OF_MEDIA = {"missing file", "unreadable video", "unreadable image", "no frames"}
_REPLACING = 1  # tells these draws from those for the example itself
_RETRY_SECONDS = 0.2, 1.0
_REASONS = {"video": "unreadable video", "image": "unreadable image", "text": "bad conversations"}
_PASSING = {  # what a network or a busy machine may get over
  getattr(errno, name)
  for name in (
    "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EINTR", "EIO",
    "EMFILE", "ENETDOWN", "ENETUNREACH", "ENFILE", "ENOBUFS", "ESTALE", "ETIMEDOUT",
  )
}  # fmt: skip


class PassedOver(NamedTuple):
  """A row that could not be used: number, source, name, one of `broken.REASONS`, and more."""

  row: int
  source: str
  label: str
  reason: str
  message: str


class Drawn(NamedTuple):
  """An example and where it is from.

  Attributes:
    example: of a row.
    row: its number in the mixture.
    passed_over: the row drawn, if this is another one, then those tried in its place.
    damaged: source and name of the row, if its video is damaged but could be read.
  """

  example: Example
  row: int
  passed_over: tuple[PassedOver, ...] = ()
  damaged: str | None = None


class ReplacingReader:
  """Gives the n-th example of a stream, always."""

  def __init__(self, rows, reader: ExampleReader, order: ExampleOrder, seed: int):
    """Reads nothing yet.

    Args:
      rows: of the mixture.
      reader: of rows.
      order: which row is which example.
      seed: of what is drawn for an example.
    """
    self._rows, self._reader, self._order, self._seed = rows, reader, order, seed

  def read(self, stream: int, number: int) -> Drawn:
    """Reads example `number` of a stream, or what stands in for it.

    Raises:
      InputError: neither the row nor any of a hundred of its kind can be read.
    """
    passed_over, broken_media = [], set()
    for row in self._candidates(stream, number):
      if not broken_media.isdisjoint(self._rows.media(row) if broken_media else ()):
        continue
      try:
        return self._drawn(stream, number, row, tuple(passed_over))
      except BrokenRow as error:
        names = one_line(self._rows.source(row)), self._rows.label(row)
        passed_over.append(PassedOver(row, *names, error.reason, str(error)))
        if error.reason in _OF_MEDIA:
          broken_media.update(self._rows.media(row))
    raise InputError(
      f"neither a row nor any of those drawn in its place can be read, {len(passed_over)} were "
      f"tried, the first one failed because of {passed_over[0].message}; mend them: vcflash data "
      "check names all"
    )

  def _candidates(self, stream, number) -> Iterator[int]:
    """The row itself, then others of its kind in the order in which they are tried."""
    row = self._order.row(stream, number)
    yield row
    rng = np.random.default_rng([self._seed, stream, number, _REPLACING])
    others = self._rows.draw_of_kind(self._rows.kind(row), 1 + _MOST_REPLACEMENTS, rng)
    yield from (other for other in others if other != row)

  def read_again(self, stream: int, number: int, row: int) -> Drawn:
    """Reads example `number` of a stream from the row that was read for it before.

    Raises:
      InputError: that row cannot be read now.
    """
    try:
      return self._drawn(stream, number, row)
    except BrokenRow as error:
      raise InputError(
        f"{self._rows.source(row)}, {self._rows.label(row)} was read before the run was saved, and "
        f"cannot be now: {error}; bring it back, or begin without the state of the batches"
      ) from error

  def _drawn(self, stream, number, row, passed_over=()) -> Drawn:
    rng = np.random.default_rng([self._seed, stream, number])
    example = self._read_patiently(row, rng)
    name = (
      f"{one_line(self._rows.source(row))}, {self._rows.label(row)}" if example.is_damaged else None
    )
    return Drawn(example, row, passed_over, name)

  def _read_patiently(self, row, rng) -> Example:
    """Tries again where a failure may pass."""
    for seconds in (*_RETRY_SECONDS, None):
      try:
        return self._reader.read(self._rows[row], rng)
      except (InputError, OSError) as error:
        if seconds is None or not may_pass(error):
          if isinstance(error, InputError):  # a row's, or one that is none of the rows' business
            raise
          raise self._as_broken(row, error) from error
      except Exception as error:  # not known beforehand what a row may bring about
        raise self._as_broken(row, error) from error
      time.sleep(seconds)
    raise AssertionError("unreachable")

  def _as_broken(self, row, error):
    return BrokenRow(_REASONS[self._rows.kind(row)], f"{type(error).__name__}: {error}")


def may_pass(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, is one that the same call may not meet again."""
  if error is None:
    return False
  is_passing = isinstance(error, OSError) and error.errno in _PASSING
  return (
    is_passing or isinstance(error, TimeoutError | ConnectionError) or may_pass(error.__cause__)
  )
