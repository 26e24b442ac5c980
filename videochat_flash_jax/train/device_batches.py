"""Batches on their way from the host to the devices of a mesh, two ahead of the step.

Every process reads the rows that its own devices hold. Where the tokens of a row lie on devices of
several processes, each of them reads the row.
"""

import weakref
from collections.abc import Mapping

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from videochat_flash_jax.errors import InputError

_BATCHES_WAITING = 1  # one more is ready in the thread's hands: two ahead


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
  """Which streams this process reads: those of the rows on its devices.

  Args:
    sharding: of the tokens of a batch.
    shape: (B, T) of all processes.
    num_streams: of all processes.

  Raises:
    InputError: a stream's rows lie on several groups of processes.
  """
  rows_each = shape[0] // num_streams
  devices = sharding.addressable_devices_indices_map(shape)
  own = {row for (rows, *_) in devices.values() for row in range(shape[0])[rows]}
  streams = sorted({row // rows_each for row in own})
  if len(own) != len(streams) * rows_each:
    num_groups = len(row_groups(sharding, shape))
    raise InputError(
      f"streams is {num_streams}, but the rows lie on {num_groups} groups of processes; "
      f"give {num_groups}, or a multiple of it"
    )
  return streams


def device_batches(
  batches: grain.IterDataset, shardings: Mapping[str, NamedSharding], num_rows: int
) -> grain.DatasetIterator:
  """Puts batches on the devices, in a thread, two ahead.

  Args:
    batches: this process's rows of each batch, as `TrainBatches` gives them.
    shardings: of the whole batch, field by field.
    num_rows: B of all processes.

  Returns:
    An iterator over dictionaries of global arrays. Its state is that of `batches` behind the last
    batch it gave, so it is what is saved. To be closed; the end of the program does it, too.
  """

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {
      name: jax.make_array_from_process_local_data(
        shardings[name], array, (num_rows, *array.shape[1:])
      )
      for name, array in batch.items()
    }

  iterator = iter(
    grain.experimental.ThreadPrefetchIterDataset(
      batches.map(put), prefetch_buffer_size=_BATCHES_WAITING
    )
  )
  weakref.finalize(iterator, _close_at_exit, weakref.ref(iterator))
  return iterator


def _close_at_exit(reference: weakref.ref):
  """Ends the thread while there are modules for it to run in, and before the workers end."""
  iterator = reference()
  if iterator is not None:
    iterator.close()
    iterator.close = lambda: None  # Grain calls it once more, after its modules are gone
