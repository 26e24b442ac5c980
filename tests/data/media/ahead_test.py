"""Reading ahead: bounded, in order, and without a thread that is left over."""

import gc
import itertools
import signal
import threading
import time

import pytest

from videochat_flash_jax.data.media.ahead import Ahead


@pytest.fixture(autouse=True)
def interrupts_are_noticed():
  """A process that was started in the background ignores them."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def threads() -> list[threading.Thread]:
  return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
  yield
  assert not soon(threads, [])


def soon(read, wanted, seconds: float = 5.0):
  """What `read` gives: `wanted`, or what it still is after some seconds."""
  deadline = time.monotonic() + seconds
  while read() != wanted and time.monotonic() < deadline:
    time.sleep(0.01)
  return read()


class Counted:
  """A generator of numbers from 0, which notes how many it gave and who closed it."""

  def __init__(self, fails_at: int | None = None):
    self.given, self.closed_by, self._fails_at = 0, None, fails_at

  def numbers(self):
    try:
      while self.given != self._fails_at:
        self.given += 1
        yield self.given - 1
      raise KeyError("lost")
    finally:
      self.closed_by = threading.current_thread().name


def test_all_items_come_in_order():
  with Ahead(range(100), 3) as items:
    assert list(items) == list(range(100))
    assert list(items) == []


@pytest.mark.parametrize("size", [1, 3])
def test_only_so_many_items_wait_and_one_is_in_the_hand(size):
  counted = Counted()
  with Ahead(counted.numbers(), size) as items:
    assert soon(lambda: counted.given, size + 1) == size + 1
    time.sleep(0.12)  # longer than a glance
    assert counted.given == size + 1
    assert [next(items), next(items)] == [0, 1]
    assert soon(lambda: counted.given, size + 3) == size + 3


def test_an_error_is_raised_where_its_item_would_have_come_and_ends_all():
  with Ahead(Counted(fails_at=2).numbers(), 5) as items:
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="lost") as raised:
      next(items)
    assert raised.traceback[-1].name == "numbers"
    assert list(items) == []


def test_an_error_of_the_beginning_is_raised_by_the_reader():
  with Ahead(3, 1) as items, pytest.raises(TypeError, match="not iterable"):  # type: ignore
    next(items)


def test_an_early_close_ends_the_thread_which_closes_the_generator():
  counted = Counted()
  items = Ahead(counted.numbers(), 2)
  assert next(items) == 0
  items.close()
  assert threads() == []
  assert counted.closed_by == "ahead"
  assert list(items) == []
  items.close()


def test_a_generator_that_reads_ahead_and_is_closed_ends_the_thread():
  def doubled():
    with Ahead(itertools.count(), 2) as items:
      for item in items:
        yield 2 * item

  pairs = doubled()
  assert [next(pairs), next(pairs)] == [0, 2]
  pairs.close()
  assert threads() == []


def test_the_thread_ends_when_nobody_holds_the_iterator():
  counted = Counted()
  items = Ahead(counted.numbers(), 1)
  assert next(items) == 0
  del items
  gc.collect()
  assert soon(threads, []) == []
  assert counted.closed_by == "ahead"


def test_an_interrupt_while_an_item_is_awaited_ends_the_thread():
  awaited = threading.Event()

  def slow():
    yield 0
    threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
    awaited.wait(0.5)
    yield 1

  main = threading.get_ident()
  start = time.monotonic()
  with pytest.raises(KeyboardInterrupt), Ahead(slow(), 1) as items:
    list(items)
  assert time.monotonic() - start < 3
  assert threads() == []


def test_a_close_does_not_wait_forever_for_an_item_that_does_not_come():
  arrives, closed = threading.Event(), threading.Event()

  def stalled():
    try:
      yield 0
      arrives.wait(30)
      yield 1
    finally:
      closed.set()

  with Ahead(stalled(), 1, patience=0.05) as items:
    assert next(items) == 0
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
      next(items)
    start = time.monotonic()
  assert time.monotonic() - start < 5
  assert len(threads()) == 1 and not closed.is_set()
  arrives.set()
  assert closed.wait(5)


def test_a_close_ends_a_reader_in_another_thread_that_waits():
  arrives = threading.Event()

  def stalled():
    arrives.wait(30)
    yield 0

  inner = Ahead(stalled(), 1)
  outer = Ahead(map(abs, inner), 1)  # its thread waits for the inner one
  time.sleep(0.1)
  outer.close()
  inner.close()
  assert soon(lambda: len(threads()), 1) == 1
  arrives.set()


def test_an_item_that_comes_late_is_not_lost():
  arrives = threading.Event()

  def late():
    arrives.wait(30)
    yield 7

  with Ahead(late(), 1, patience=0.3) as items:
    with pytest.raises(TimeoutError):
      next(items)
    arrives.set()
    assert soon(lambda: items.busy_seconds > 0, True)
    assert list(items) == [7]


def test_busy_seconds_are_those_of_the_iterable_and_not_those_of_the_reader():
  def slow():
    for number in range(5):
      time.sleep(0.02)
      yield number

  with Ahead(slow(), 1) as items:
    for _ in items:
      time.sleep(0.1)
    assert 0.1 <= items.busy_seconds < 0.35  # the reader took 0.5 s
