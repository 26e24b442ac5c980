"""Batches on their way from the host to the devices of a mesh, one ahead of the step.

Every process reads the rows that its own devices hold. Where the tokens of a row lie on devices of
several processes, each of them reads the row.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from videochat_flash_jax.errors import InputError

_BATCHES_WAITING = 1  # on the host; one more is ready in the thread's hands


def row_groups(sharding: NamedSharding, shape: tuple[int, int]) -> list[tuple[int, ...]]:
  """Rows that are read together, by one process or by several that share them.

  A batch of 8 rows over 4 processes, of which two share each row:   (0 1 2 3) (4 5 6 7)
  The number of groups is what `DataConfig.streams` should be.

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of all processes.

  Raises:
    InputError: processes hold overlapping but not the same rows.
  """
  num_rows, rows_of_process = shape[0], {}
  for device, (rows, *_) in sharding.devices_indices_map(shape).items():
    held = rows_of_process.setdefault(device.process_index, set())
    held |= set(range(num_rows)[rows])
  groups = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
  if sum(map(len, groups)) != num_rows or len({len(rows) for rows in groups}) > 1:
    raise InputError(
      f"{num_rows} rows do not lie on the processes in equal groups; "
      "change the mesh, so that each process holds as many devices along data and fsdp"
    )
  return groups


def own_streams(sharding: NamedSharding, shape: tuple[int, int], num_streams: int) -> list[int]:
  """Which streams this process reads: those that have rows on its devices.

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of all processes.
    num_streams: of all processes.
  """
  rows_each = shape[0] // num_streams
  return sorted({row // rows_each for row in _rows_here(sharding, shape)})


def own_rows(sharding: NamedSharding, shape: tuple[int, int], num_streams: int) -> list[int]:
  """Which rows of those that its streams give lie on this process's devices.

  All of them, unless a run goes on with more processes than it has streams: of 4 rows of one
  stream, two processes read 4 each, and keep (0 1) and (2 3).

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of all processes.
    num_streams: of all processes.
  """
  rows_each = shape[0] // num_streams
  streams = own_streams(sharding, shape, num_streams)
  return [
    streams.index(row // rows_each) * rows_each + row % rows_each
    for row in sorted(_rows_here(sharding, shape))
  ]


def _rows_here(sharding, shape):
  devices = sharding.addressable_devices_indices_map(shape)
  return {row for (rows, *_) in devices.values() for row in range(shape[0])[rows]}


def device_batches(
  batches: grain.IterDataset, shardings: Mapping[str, Any], num_rows: int
) -> grain.DatasetIterator:
  """Puts batches on the devices when they are asked for; a thread has the next ones ready.

  Asked for the next one while a step runs, it copies that meanwhile: the devices hold two batches.

  Args:
    batches: this process's rows of each batch, as `TrainBatches` gives them; a field may be a tree.
    shardings: of the whole batch, field by field: `NamedSharding`s, or trees of them.
    num_rows: B of all processes.

  Returns:
    An iterator over dictionaries of global arrays. Its state is that of `batches` behind the last
    batch it gave, so it is what is saved. To be closed; the end of the program does it, too.
  """

  def put_array(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
    shape = (num_rows, *array.shape[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  def put(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.tree.map(put_array, shardings[name], field) for name, field in batch.items()}

  return iter(_ReadAhead(batches, prefetch_buffer_size=_BATCHES_WAITING).map(put))


class _ReadAhead(grain.experimental.ThreadPrefetchIterDataset):
  """Has the next batches read by a thread, which ends with the program."""

  def __iter__(self) -> grain.DatasetIterator:
    iterator = super().__iter__()
    weakref.finalize(iterator, _close_at_exit, weakref.ref(iterator))
    return iterator


def _close_at_exit(reference: weakref.ref):
  """Ends the thread while there are modules for it to run in, and before the workers end."""
  iterator = reference()
  if iterator is not None:
    iterator.close()
    iterator.close = lambda: None  # Grain calls it once more, after its modules are gone
