"""Copies batches from the host to the devices of a mesh, one batch ahead of the step.

Every process reads the rows that its own devices hold. If the tokens of a row are split over
devices of several processes, each of these processes reads the whole row.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from videochat_flash_jax.errors import InputError

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


def device_batches(
  batches: grain.IterDataset, shardings: Mapping[str, Any], num_rows: int
) -> grain.DatasetIterator:
  """Copies each batch to the devices when it is asked for; a thread reads the next ones.

  If the next batch is asked for while a step runs, it is copied during the step. The devices then
  hold two batches.

  Args:
    batches: this process's rows of each batch, as `TrainBatches` gives them; a field may be a tree.
    shardings: of each field of the whole batch: `NamedSharding`s, or trees of them.
    num_rows: B of the batch of all processes.

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

  return iter(_ReadAhead(batches, prefetch_buffer_size=_BATCHES_WAITING).map(put))


class _ReadAhead(grain.experimental.ThreadPrefetchIterDataset):
  """Reads the next batches in a thread, which ends with the program."""

  def __iter__(self) -> grain.DatasetIterator:
    iterator = super().__iter__()
    weakref.finalize(iterator, _close_at_exit, weakref.ref(iterator))
    return iterator


def _close_at_exit(reference: weakref.ref):
  """Ends the thread before Python unloads the modules it needs, and before the workers end."""
  iterator = reference()
  if iterator is not None:
    iterator.close()
    iterator.close = lambda: None  # Grain calls it again, after its modules are unloaded
