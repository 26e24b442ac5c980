"""Reads ahead in a thread, so that the next items are made while the last ones are used."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_GLANCE_SECONDS = 0.05  # how often a thread whose queue is full looks whether it should end
_CLOSE_SECONDS = 1.0  # how long `close` waits for the item that is being made


class Ahead(Iterator[_Item]):
  """Iterates in a thread; at most `size` items wait, and one more is being made.

  with Ahead(video.frames(indices, 224), size=8) as frames:
    for frame in frames:  # the next ones are decoded meanwhile
      ...

  An error of the iterable is raised where its item would have come. The thread starts at once. It
  ends after the last item, after an error, after `close`, and when nobody holds this object any
  more; and then it closes the iterable, if that can be closed, as a generator can.

  grain's `ThreadPrefetchIterDataset` reads ahead, too, but only iterators with a state to save. It
  closes them in another thread than the one that runs them, and waits for that thread forever.
  """

  def __init__(self, iterable: Iterable[_Item], size: int, patience: float | None = None):
    """Starts the thread.

    Args:
      iterable: is iterated, and closed, in the thread alone.
      size: the most items that wait, from 1.
      patience: the most seconds to wait for an item; None to wait forever.
    """
    self._work = _Work(iterable, size)
    self._patience, self._ended = patience, False
    weakref.finalize(self, self._work.stop.set)
    self._work.start()

  @property
  def busy_seconds(self) -> float:
    """Wall time spent in the iterable so far, without the time in which enough items waited."""
    return self._work.busy_seconds

  def __next__(self) -> _Item:
    """Returns the next item.

    Raises:
      TimeoutError: none came in `patience` seconds; it may still come.
    """
    if self._ended:
      raise StopIteration
    try:
      item, error = self._work.done.get(timeout=self._patience)
    except queue.Empty:
      raise TimeoutError(f"nothing came for {self._patience:g} s") from None
    if error is None:
      return item
    self._ended = True
    try:
      raise error
    finally:
      del error  # its traceback holds this frame, and so all that the frame holds

  def close(self) -> None:
    """Ends the thread and drops what waits; after it there is no further item.

    Returns once the thread has ended, or after a second if the iterable still makes an item, such
    as a camera that sends nothing. The thread then ends when that item comes.
    """
    self._ended = True
    self._work.stop.set()
    self._work.join(_CLOSE_SECONDS)
    with contextlib.suppress(queue.Full):  # another thread may wait for an item; none comes now
      self._work.done.put_nowait((None, StopIteration()))

  def __enter__(self) -> "Ahead[_Item]":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


class _Work(threading.Thread):
  """Fills a queue with pairs (item, None), and at last (None, error).

  It holds no reference to its `Ahead`, so that it can end when that is dropped.
  """

  def __init__(self, iterable: Iterable, size: int):
    super().__init__(name="ahead", daemon=True)
    self.done: queue.Queue = queue.Queue(size)
    self.stop = threading.Event()
    self.busy_seconds = 0.0
    self._iterable = iterable

  def run(self):
    """Iterates until the end, an error or `stop`."""
    try:
      iterator = iter(self._iterable)
      try:
        while not self.stop.is_set():
          self._put(self._next_of(iterator), None)
      finally:
        if hasattr(iterator, "close"):
          iterator.close()
    except BaseException as error:  # StopIteration, too
      self._put(None, error)

  def _next_of(self, iterator):
    start = time.perf_counter()
    try:
      return next(iterator)
    finally:
      self.busy_seconds += time.perf_counter() - start

  def _put(self, item, error):
    """Waits until the queue has room, or until nobody wants the item any more."""
    while not self.stop.is_set():
      try:
        return self.done.put((item, error), timeout=_GLANCE_SECONDS)
      except queue.Full:
        continue
