"""Threads that share a conversation: one uses it at a time, and the others wait for their turn."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

from videochat_flash_jax.errors import InputError


class Turns:
  """Whose turn it is.

  A turn ends by `end`. A thread that begins another one before has left the one that it had, such
  as a streamed answer that it did not read to its end.
  """

  def __init__(self):
    self._changed = threading.Condition()
    self._thread: int | None = None  # that has its turn
    self._turn: object | None = None  # the last one that began

  def begin(self) -> object:
    """Waits until no other thread has its turn. Returns the new turn."""
    thread = threading.get_ident()
    with self._changed:
      self._changed.wait_for(lambda: self._thread in (None, thread))
      self._thread, self._turn = thread, object()
      return self._turn

  def end(self, turn: object) -> None:
    """Ends a turn, if it has not ended yet."""
    with self._changed:
      if self._turn is turn:
        self._thread = None
        self._changed.notify_all()

  @contextlib.contextmanager
  def one(self) -> Iterator[object]:
    """A turn that lasts as long as the block."""
    turn = self.begin()
    try:
      yield turn
    finally:
      self.end(turn)

  def check(self, turn: object) -> None:
    """Checks that no later turn began.

    Raises:
      InputError: one did.
    """
    if self._turn is not turn:
      raise InputError(
        "this answer was overtaken by a later call; read a stream to its end before the next call"
      )


class Stream(Iterator[str]):
  """Pieces of an answer. Its turn ends with it, when it is closed, and when nobody holds it."""

  def __init__(self, pieces: Iterator[str], end: Callable[[], None]):
    """Takes a generator of pieces, and what ends the turn."""
    self._pieces, self._end = pieces, weakref.finalize(self, end)

  def __next__(self) -> str:
    try:
      return next(self._pieces)
    except BaseException:  # StopIteration, too
      self._end()
      raise

  def close(self) -> None:
    """Writes no more of the answer."""
    self._pieces.close()
    self._end()
