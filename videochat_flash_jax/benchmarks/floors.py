"""Measures the limits of the machine: the speed of its matrix products and of its memory.

The floor is the least time that some work can take. It is the longer of two times: that of its
flops at the speed of a matrix product in the cache, and that of its bytes at the speed of reading
memory. Only unavoidable work counts: inputs and weights are read once, outputs are written once. In
all our benchmarks few of the bytes are written; a copy is measured to show the difference.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.benchmarks.timing import Seconds

FLOAT_BYTES = 4
_PRODUCT_SIZE = 1536  # three such matrices fit into the last cache of a CPU
_MEMORY_VALUES = 1 << 26  # 256 MiB, far more than any cache
_ROW_VALUES = 1 << 13  # summed at a time, since a sum of all values runs on one core
_TRIES = 10  # per round: short and many, so that some run while the machine does nothing else


class Work(NamedTuple):
  """The least work of a piece of code: floating-point operations, and bytes read and written."""

  flops: float
  bytes: float


class Limits(NamedTuple):
  """Measured speeds of the machine."""

  flops_per_second: float
  bytes_read_per_second: float
  bytes_copied_per_second: float  # read and written ones

  def floor(self, work: Work) -> tuple[float, str]:
    """The least seconds that the work takes, and which of the two bounds it: "flops" or "bytes"."""
    computing, moving = work.flops / self.flops_per_second, work.bytes / self.bytes_read_per_second
    return max((computing, "flops"), (moving, "bytes"))


def limit_pieces() -> dict[tuple[str, int], Callable[[], object]]:
  """A large square matrix product, and reading and copying in memory, each several times.

  They are timed in turns with the code whose floor they give, see `measured_limits`.
  """
  matrix = jnp.ones((_PRODUCT_SIZE, _PRODUCT_SIZE))
  multiply = jax.jit(lambda x: x @ x)
  # Each value is written back to where it was read: new memory pages would cost more than the copy.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  values = [jnp.ones(_MEMORY_VALUES)]
  read = jax.jit(lambda x: x.reshape(-1, min(_ROW_VALUES, x.size)).sum(axis=1))

  def copy_in_place():
    """Reads and writes all values once."""
    values[0] = copy(values[0])
    return values[0]

  works = {
    "product": lambda: multiply(matrix),
    "read": lambda: read(values[0]),
    "copy": copy_in_place,
  }
  return {(name, number): work for name, work in works.items() for number in range(_TRIES)}


def measured_limits(times: Mapping[Hashable, Seconds]) -> Limits:
  """The speeds that follow from the best times of `limit_pieces`."""
  product, read, copy = (
    min(times[name, i].best for i in range(_TRIES)) for name in ("product", "read", "copy")
  )
  num_bytes = _MEMORY_VALUES * FLOAT_BYTES
  return Limits(2 * _PRODUCT_SIZE**3 / product, num_bytes / read, 2 * num_bytes / copy)
