"""One stream of examples, read ahead by worker processes and packed into rows.

A place in it is saved as two things: the number of the next example, and for each row that is not
full yet the examples in it, each with the row of the mixture that was read for it:

  {"next": 17, "unfinished": [[[12, 204], [15, 31]], [[16, 7]]]}

Those are read once more when a run goes on. They have to be the same rows as before, although by
then others may be readable, so which ones they were is not worked out again. If rows have another
layout by then (they are spread over more devices, say), the examples are packed anew.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, Protocol

import grain
from absl import flags

from videochat_flash_jax.data.batches.broken_share import BrokenShare
from videochat_flash_jax.data.batches.data_config import DataConfig
from videochat_flash_jax.data.batches.replacement import Drawn
from videochat_flash_jax.data.batches.row_packer import Packed, RowPacker
from videochat_flash_jax.errors import InputError

_ENDLESS = 1 << 40
_EXAMPLES_AHEAD = 2  # of each worker
_LEAST_SHARED_BYTES = 1 << 16  # smaller arrays are sent, larger ones handed over in shared memory
_FOR_PROGRAM = (signal.SIGTERM, signal.SIGINT)  # what schedulers and terminals send to all at once


class Reader(Protocol):
  """Gives the n-th example of a stream: `ReplacingReader`, or `SyntheticReader`."""

  def read(self, stream: int, number: int) -> Drawn:
    """Reads example `number` of a stream."""

  def read_again(self, stream: int, number: int, row: int) -> Drawn:
    """Reads it as it was read before, from `row`."""


class PackedStream:
  """Gives packed rows, endlessly."""

  def __init__(self, reader: Reader, number: int, config: DataConfig):
    """Reads nothing yet; `number` is that of the stream."""
    self._reader, self._number, self._config = reader, number, config
    self._drawn: grain.DatasetIterator | None = None
    self._packer: RowPacker | None = None
    self._is_drawn_from = False
    self._next, self._unfinished, self._is_anew = 0, [], False

  def state(self) -> dict[str, Any]:
    """Fit for JSON; see the module's example."""
    unfinished = self._packer.unfinished if self._packer else self._unfinished
    return {"next": self._next, "unfinished": unfinished}

  def set_state(self, state: dict[str, Any], is_anew: bool = False):
    """Goes on from what `state` gave; `is_anew`: it was saved with another layout of rows."""
    self.stop()
    self._next, self._unfinished, self._is_anew = state["next"], state["unfinished"], is_anew

  def start(self):
    """Begins to read, if that has not begun yet."""
    if self._drawn is None:
      self._is_drawn_from, again = False, [pair for row in self._unfinished for pair in row]
      self._drawn = _read_ahead(self._reader, self._number, self._config.workers, again, self._next)

  def stop(self):
    """Ends the workers; the stream can be started again where it is."""
    if self._packer is not None:
      self._unfinished, self._packer, self._is_anew = self._packer.unfinished, None, False
    if self._drawn is not None:
      self._drawn.close()
      self._drawn = None

  def next_row(self, share: BrokenShare) -> list[Packed]:
    """The next row, of which new examples are counted in `share`.

    Raises:
      InputError: too many rows cannot be read, or one that is to be read again; or a worker died.
        Then the stream is good for nothing but `set_state`.
    """
    if self._packer is None:
      self._packer = self._begun_packer()
    full = None
    while full is None:
      drawn = self._draw()
      share.count(drawn, self._number)
      full = self._packer.add(Packed(self._next, drawn.row, drawn.example))
      self._next += 1
    return full

  def _begun_packer(self) -> RowPacker:
    """One that holds the examples of the unfinished rows, read again; they were counted before."""
    packer = RowPacker(self._config.layout)
    for row in self._unfinished:
      items = [Packed(number, source_row, self._draw().example) for number, source_row in row]
      if not self._is_anew:
        packer.put_together(items)
        continue
      for item in items:
        packer.put(item)
    return packer

  def _draw(self) -> Drawn:
    try:
      if self._is_drawn_from:
        return next(self._drawn)
      self._is_drawn_from = True
      with _signals_held_back():  # Grain starts the workers now
        return next(self._drawn)
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):  # Grain's words
        raise
      raise InputError(
        "a process that reads training data has died, mostly for want of memory: give fewer "
        "workers or more memory, in a container also more shared memory (docker run --shm-size); "
        'or of a script without `if __name__ == "__main__":`, which each of them runs again'
      ) from error


def stop_all(streams: Iterable[PackedStream]):
  """Ends the workers of streams."""
  for stream in streams:
    stream.stop()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
  """Threads and processes that are started within it never get signals that are the program's.

  A scheduler's SIGTERM, or Ctrl-C in a terminal, goes to all processes of a run. It is for the
  program to end its workers, when it has saved what they read.
  """
  resource_tracker.ensure_running()  # which lets the signals through again when it is started
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_PROGRAM)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _end_with_program():
  """Has a worker process end when the program is gone, even if that was killed."""
  program = multiprocessing.parent_process()

  def follow():
    program.join()
    os._exit(1)

  if program is not None:
    threading.Thread(target=follow, daemon=True).start()


def _read_ahead(
  reader: Reader,
  stream: int,
  workers: int,
  again: Sequence[Sequence[int]],
  first: int,
) -> grain.DatasetIterator:
  """Yields the examples `again`, numbers and rows, then all from number `first` on."""

  def draw(place: int) -> Drawn:
    _end_with_program()
    if place < len(again):
      return reader.read_again(stream, *again[place])
    return reader.read(stream, first + place - len(again))

  # One at a time and nothing ahead, in each worker: its output is buffered already.
  read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  examples = grain.MapDataset.range(_ENDLESS).map(draw).to_iter_dataset(read_options)
  options = grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED_BYTES)
  examples = grain.experimental.WithOptionsIterDataset(examples, options)
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain asks for it
      flags.FLAGS.mark_as_parsed()
    examples = examples.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=_EXAMPLES_AHEAD)
    )
  drawn = iter(examples)
  drawn.start_prefetch()
  return drawn
