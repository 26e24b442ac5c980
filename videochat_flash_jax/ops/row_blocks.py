"""Work that treats rows alike, done a block of rows at a time where that is faster."""

import math
from collections.abc import Callable

import jax

from videochat_flash_jax.shapes import Array, Float

_BLOCK_VALUES = 1 << 22  # 16 MiB in float32, half of the last cache of a CPU


def map_row_blocks(
  apply: Callable[[Array], Array], x: Float[Array, "..."], values_per_row: int, row_axes: int = 1
) -> Float[Array, "..."]:
  """Returns `apply(x)`; on a CPU block by block, so that what lies between stays in its cache.

  XLA's matrix products on the CPU lose a seventh of their speed when their operands outgrow the
  cache. Other devices get all rows at once.

  Args:
    apply: maps any number of rows to as many rows, each by itself.
    x: input, with rows along the first axes.
    values_per_row: the widest that a row becomes inside `apply`.
    row_axes: how many axes these are. They are made one for blocks only: on a mesh they may be
      split, each in its own way.
  """
  block = max(1, _BLOCK_VALUES // values_per_row)
  if math.prod(x.shape[:row_axes]) <= block:
    return apply(x)

  def in_blocks(x):
    rows = x.reshape(-1, *x.shape[row_axes:])
    rows = jax.lax.map(lambda row: apply(row[None])[0], rows, batch_size=block)
    return rows.reshape(x.shape)

  return jax.lax.platform_dependent(x, cpu=in_blocks, default=apply)
