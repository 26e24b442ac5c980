"""Copies batches from the host to the devices of a mesh, one batch ahead of the step.

Every process reads the rows that its own devices hold. If the tokens of a row are split over
devices of several processes, each of these processes reads the whole row; `StreamExchanges` let
them agree on what it holds.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.exchange import CoordinationStore, Exchange

_NUMBERS = itertools.count()  # of objects that are made in the same order by all processes
_BATCHES_WAITING = 1  # on the host; the thread holds one more


def row_groups(sharding: NamedSharding, shape: tuple[int, int]) -> list[tuple[int, ...]]:
  """The rows of a batch by the processes that read them.

  A batch of 8 rows on 4 processes, where two processes share each row:   (0 1 2 3) (4 5 6 7)
  `DataConfig.streams` should be the number of groups.

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of the batch of all processes.

  Raises:
    InputError: two processes share some, but not all of their rows.
  """
  num_rows, rows_of_process = shape[0], {}
  for device, (rows, *_) in sharding.devices_indices_map(shape).items():
    held = rows_of_process.setdefault(device.process_index, set())
    held |= set(range(num_rows)[rows])
  groups = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
  if sum(map(len, groups)) != num_rows or len({len(rows) for rows in groups}) > 1:
    raise InputError(
      f"{num_rows} rows cannot be split over the processes in equal groups; change the mesh, so "
      "that all processes have equally many devices along data and fsdp"
    )
  return groups


def own_streams(sharding: NamedSharding, shape: tuple[int, int], num_streams: int) -> list[int]:
  """The streams that this process reads: those that have rows on its devices.

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of the batch of all processes.
    num_streams: of all processes together.
  """
  rows_each = shape[0] // num_streams
  return sorted({row // rows_each for row in _rows_here(sharding, shape)})


def stream_readers(
  sharding: NamedSharding, shape: tuple[int, int], num_streams: int
) -> dict[int, list[int]]:
  """The processes that read each stream: those that have rows of it on their devices.

  Arguments are those of `own_streams`.
  """
  rows_each, readers = shape[0] // num_streams, {}
  for device, (rows, *_) in sharding.devices_indices_map(shape).items():
    for row in range(shape[0])[rows]:
      readers.setdefault(row // rows_each, set()).add(device.process_index)
  return {stream: sorted(readers[stream]) for stream in sorted(readers)}


def own_rows(sharding: NamedSharding, shape: tuple[int, int], num_streams: int) -> list[int]:
  """Which of the rows that this process reads are on its devices, as indices into what it reads.

  These are all rows, unless a run resumes with more processes than it has streams: if one stream
  gives 4 rows, two processes read 4 rows each, and keep (0 1) and (2 3).

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of the batch of all processes.
    num_streams: of all processes together.
  """
  rows_each = shape[0] // num_streams
  streams = own_streams(sharding, shape, num_streams)
  return [
    streams.index(row // rows_each) * rows_each + row % rows_each
    for row in sorted(_rows_here(sharding, shape))
  ]


def _rows_here(sharding, shape):
  """The rows of a batch of which this process's devices hold at least a part."""
  devices = sharding.addressable_devices_indices_map(shape)
  return {row for (rows, *_) in devices.values() for row in range(shape[0])[rows]}


class StreamExchanges:
  """Exchanges with the processes that read the same streams as this one.

  It is a `shared_stream.Sharing`: see there for `unit`.
  """

  def __init__(self, readers: Mapping[int, Sequence[int]], unit: str):
    """Starts no exchange yet. All processes must make these objects in the same order.

    Args:
      readers: of `stream_readers`.
      unit: what a batch is for.
    """
    self.unit, here = unit, jax.process_index()
    self._readers = {
      stream: processes
      for stream, processes in readers.items()
      if here in processes and len(processes) > 1
    }
    self._here, self._name, self._begun = here, f"batches/{next(_NUMBERS)}", 0
    self._exchanges: dict[int, Exchange] = {}

  def begin(self) -> dict[int, Exchange]:
    """Ends the last exchanges; returns new ones, by the streams that other processes read, too."""
    self.interrupt()
    for exchange in self._exchanges.values():
      exchange.forget()
    self._begun += 1
    self._exchanges = {
      stream: Exchange(
        f"{self._name}/{self._begun}/{stream}", processes, self._here, CoordinationStore()
      )
      for stream, processes in self._readers.items()
    }
    return self._exchanges

  def interrupt(self):
    """Ends the waiting for other processes: no more batches are read from these exchanges."""
    for exchange in self._exchanges.values():
      exchange.interrupt()


def device_batches(
  batches: grain.IterDataset,
  shardings: Mapping[str, Any],
  num_rows: int,
  exchanges: StreamExchanges | None = None,
) -> grain.DatasetIterator:
  """Copies each batch to the devices when it is asked for; a thread reads the next ones.

  If the next batch is asked for while a step runs, it is copied during the step. The devices then
  hold two batches.

  Args:
    batches: this process's rows of each batch, as `TrainBatches` gives them; a field may be a tree.
    shardings: of each field of the whole batch: `NamedSharding`s, or trees of them.
    num_rows: B of the batch of all processes.
    exchanges: those that `batches` were given, if they were given any.

  Returns:
    An iterator over dictionaries of global arrays. Its state is that of `batches` after the last
    batch that it returned, so this is the state to save. Close it after use; the end of the program
    closes it, too.
  """

  def put_array(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
    """A global array from this process's rows of it."""
    shape = (num_rows, *array.shape[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  def put(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of global arrays."""
    return {name: jax.tree.map(put_array, shardings[name], field) for name, field in batch.items()}

  read_ahead = grain.experimental.ThreadPrefetchIterDataset(
    batches, prefetch_buffer_size=_BATCHES_WAITING
  )
  return _DeviceBatches(iter(read_ahead), put, exchanges)


class _DeviceBatches(grain.DatasetIterator):
  """Puts each batch on the devices when it is asked for; the thread of its parent reads ahead."""

  def __init__(
    self,
    parent: grain.DatasetIterator,
    put: Callable[[dict[str, Any]], dict[str, Any]],
    exchanges: StreamExchanges | None,
  ):
    super().__init__(parent)
    self.read_ahead, self._put, self._exchanges = parent, put, exchanges
    weakref.finalize(self, _close_at_exit, weakref.ref(self))

  def __next__(self) -> dict[str, Any]:
    return self._put(next(self.read_ahead))

  def get_state(self) -> dict[str, Any]:
    return self.read_ahead.get_state()

  def set_state(self, state: dict[str, Any]):
    self._stop_waiting()
    self.read_ahead.set_state(state)

  def close(self):
    """Ends the thread, and the workers."""
    if not self._closed:
      self._stop_waiting()
    super().close()

  def _stop_waiting(self):
    """Lets the thread end even if it waits for a process that reads no more batches."""
    if self._exchanges is not None:
      self._exchanges.interrupt()


def _close_at_exit(reference: weakref.ref):
  """Ends the thread before Python unloads the modules it needs, and before the workers end."""
  iterator = reference()
  if iterator is not None:
    iterator.close()
    # Grain calls it again, after its modules are unloaded.
    iterator.read_ahead.close = lambda: None
