"""What the machine can do at best: its matrix products and its memory, measured.

The floor of some work is the time that its flops take at the rate of a matrix product that stays in
the cache, or its bytes at the rate of a copy in memory, whichever is longer. Only what cannot be
avoided counts as work: inputs and weights read once, outputs written once.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.benchmarks.timing import Seconds

FLOAT_BYTES = 4
_PRODUCT_SIZE = 1536  # three such matrices fit into the last cache of a CPU
_COPY_VALUES = 1 << 26  # 256 MiB, far more than any cache
_TRIES = 10  # a round: short and many, so that some fall between a busy machine's other work


class Work(NamedTuple):
  """The least that has to be done."""

  flops: float
  bytes: float


class Limits(NamedTuple):
  """Rates that the machine reached."""

  flops_per_second: float
  bytes_per_second: float

  def floor(self, work: Work) -> tuple[float, str]:
    """The least seconds that the work can take, and what binds: "flops" or "bytes"."""
    computing, moving = work.flops / self.flops_per_second, work.bytes / self.bytes_per_second
    return max((computing, "flops"), (moving, "bytes"))


def limit_pieces() -> dict[tuple[str, int], Callable[[], object]]:
  """Tries of a large square matrix product and of a copy, to be timed beside what they bound."""
  matrix = jnp.ones((_PRODUCT_SIZE, _PRODUCT_SIZE))
  multiply = jax.jit(lambda x: x @ x)
  # Each value is read and written back where it was: fresh pages would cost more than the copy.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  values = [jnp.ones(_COPY_VALUES)]

  def copy_in_place():
    values[0] = copy(values[0])
    return values[0]

  works = {"product": lambda: multiply(matrix), "copy": copy_in_place}
  return {(name, number): work for name, work in works.items() for number in range(_TRIES)}


def measured_limits(times: Mapping[Hashable, Seconds]) -> Limits:
  """Rates from the best times of `limit_pieces`."""
  product, copy = (min(times[name, i].best for i in range(_TRIES)) for name in ("product", "copy"))
  return Limits(2 * _PRODUCT_SIZE**3 / product, 2 * _COPY_VALUES * FLOAT_BYTES / copy)
