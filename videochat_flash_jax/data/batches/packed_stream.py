"""Reads one stream of examples ahead with worker processes, and packs it into rows.

The state of a stream has two parts: the number of the next example, and the content of each packed
row that is not full yet. Such a packed row is a list of pairs: the number of an example, and the
row of the mixture that was read for it.

  {"next": 17, "unfinished": [[[12, 204], [15, 31]], [[16, 7]]]}

A resumed run reads the examples of the unfinished rows again. They must come from the same rows of
the mixture as before, even if other rows can be read by then; that is why their numbers are saved
and not computed again. If the shape of packed rows has changed (for example, they are split over
more devices), these examples are packed again.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

from videochat_flash_jax.data.batches.broken_share import BrokenShare
from videochat_flash_jax.data.batches.data_config import DataConfig
from videochat_flash_jax.data.batches.replacement import Drawn, Reader
from videochat_flash_jax.data.batches.row_packer import Packed, RowPacker
from videochat_flash_jax.data.batches.shared_stream import Peers, SharedStream, with_digest
from videochat_flash_jax.errors import InputError

_ENDLESS = 1 << 40
_EXAMPLES_AHEAD = 2  # that each worker reads before they are needed
_MIN_SHARED_BYTES = 1 << 16  # larger arrays go through shared memory, smaller ones through a pipe
# Schedulers and terminals send these signals to all processes of a run at once.
_PROGRAM_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PackedStream:
  """An endless iterator over packed rows.

  Attributes:
    shared: what `share` was given; None if only this process reads the stream.
  """

  def __init__(self, reader: Reader, stream: int, config: DataConfig):
    """Prepares stream number `stream`; nothing is read yet."""
    self._reader, self._stream, self._config = reader, stream, config
    self._examples: grain.DatasetIterator | None = None
    self._packer: RowPacker | None = None
    self.shared: SharedStream | None = None
    self._has_started = False
    self._next, self._unfinished, self._repack = 0, [], False

  def share(self, peers: Peers):
    """Makes the stream the same as that of other processes; before `start`."""
    self.shared = SharedStream(self._reader, self._stream, peers)

  def state(self) -> dict[str, Any]:
    """Returns the state as JSON values; see the example of the module."""
    unfinished = self._packer.unfinished if self._packer else self._unfinished
    return {"next": self._next, "unfinished": unfinished}

  def set_state(self, state: dict[str, Any], repack: bool = False):
    """Restores what `state` returned.

    Args:
      state: the saved state.
      repack: whether the examples of unfinished rows are packed again, because rows had another
        shape when the state was saved.
    """
    self.stop()
    self._next, self._unfinished, self._repack = state["next"], state["unfinished"], repack

  def start(self):
    """Starts to read, if that has not started yet."""
    if self._examples is None:
      self._has_started, again = False, [pair for row in self._unfinished for pair in row]
      self._examples = _read_ahead(
        self._reader,
        self._stream,
        self._config.workers,
        again,
        self._next,
        is_shared=self.shared is not None,
      )

  def stop(self):
    """Ends the workers; `start` continues from the same example."""
    if self._packer is not None:
      self._unfinished, self._packer, self._repack = self._packer.unfinished, None, False
    if self._examples is not None:
      self._examples.close()
      self._examples = None

  def next_row(self, share: BrokenShare) -> list[Packed]:
    """Reads examples until a row is full, and returns that row.

    Args:
      share: counts the new examples.

    Raises:
      InputError: too many rows cannot be read, a row that must be read again cannot be read, or a
        worker died; here, or in another process that reads the stream. After the error only
        `set_state` may be called.
    """
    if self._packer is None:
      self._packer = self._restored_packer()
    full = None
    while full is None:
      drawn = self._agreed(self._next)
      share.count(drawn, self._stream)
      full = self._packer.add(Packed(self._next, drawn.row, drawn.example))
      self._next += 1
    return full

  def _restored_packer(self) -> RowPacker:
    """A packer with the examples of the unfinished rows.

    The examples are read again, but not counted again.
    """
    packer = RowPacker(self._config.row_shape)
    for row in self._unfinished:
      items = [Packed(*pair, self._agreed(*pair).example) for pair in row]
      if not self._repack:
        packer.begin_row(items)
        continue
      for item in items:
        packer.put(item)
    return packer

  def _agreed(self, number: int, row: int | None = None) -> Drawn:
    """The next example, which has this number; it is read again if its `row` is given.

    All processes that read the stream get the same one.
    """
    if self.shared is None:
      return self._draw()
    if row is None:
      other = functools.partial(self._reader.read, self._stream, number)
    else:
      other = functools.partial(self._reader.read_again, self._stream, number, row)
    return self.shared.take(number, self._draw, other)

  def _draw(self) -> Drawn:
    """The next example that was read ahead."""
    try:
      if self._has_started:
        return next(self._examples)
      self._has_started = True
      with _program_signals_blocked():  # the first `next` makes Grain start the workers
        return next(self._examples)
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):  # part of Grain's message
        raise
      raise InputError(
        "a process that reads training data has died. If there was too little memory (the usual "
        "reason): give fewer workers or more memory, in a container also more shared memory "
        '(docker run --shm-size). If your script has no `if __name__ == "__main__":`: add it, '
        "because each of these processes runs the script again"
      ) from error


def stop_all(streams: Iterable[PackedStream]):
  """Ends the workers of all these streams."""
  for stream in streams:
    stream.stop()


@contextlib.contextmanager
def _program_signals_blocked() -> Iterator[None]:
  """Blocks SIGTERM and SIGINT for all threads and processes that are started inside the block.

  A scheduler's SIGTERM, or Ctrl-C in a terminal, goes to all processes of a run. But only the main
  process may end the workers, after it has saved the state of what they read.
  """
  resource_tracker.ensure_running()  # its start would unblock the signals, so it is started before
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _PROGRAM_SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _end_with_program():
  """Makes a worker process end when the main process has ended, even if that one was killed."""
  program = multiprocessing.parent_process()

  def exit_after_program():
    """Waits for the end of the main process, then ends this one at once."""
    program.join()
    os._exit(1)

  if program is not None:
    threading.Thread(target=exit_after_program, daemon=True).start()


def _read_ahead(
  reader: Reader,
  stream: int,
  workers: int,
  again: Sequence[Sequence[int]],
  first: int,
  is_shared: bool,
) -> grain.DatasetIterator:
  """Yields the examples `again` (pairs of number and row), then all from number `first` on.

  If the stream `is_shared`, they have digests.
  """

  def draw(index: int) -> Drawn:
    """Reads the example with this index in the iterator."""
    _end_with_program()
    if index < len(again):
      drawn = reader.read_again(stream, *again[index])
    else:
      drawn = reader.read(stream, first + index - len(again))
    return with_digest(drawn) if is_shared else drawn

  # Each worker reads one example at a time: its output has a buffer of its own.
  read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  examples = grain.MapDataset.range(_ENDLESS).map(draw).to_iter_dataset(read_options)
  options = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
  examples = grain.experimental.WithOptionsIterDataset(examples, options)
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain requires it
      flags.FLAGS.mark_as_parsed()
    examples = examples.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=_EXAMPLES_AHEAD)
    )
  iterator = iter(examples)
  iterator.start_prefetch()
  return iterator
