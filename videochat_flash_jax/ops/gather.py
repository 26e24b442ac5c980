"""Picks tokens out of rows."""

import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.shapes import Array, Int, Shaped


def gather_tokens(
  x: Shaped[Array | np.ndarray, "B T ..."], index: Int[Array | np.ndarray, "B S"], fill: int = 0
) -> Shaped[Array, "B S ..."]:
  """Picks the tokens at `index` of each row; an index beyond the row gives `fill`.

  gather_tokens([[a, b, c]], [[2, 0, 3]]) = [[c, a, 0]]
  """
  index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)


def gather_from_block(
  block: Shaped[Array, "B T ..."], index: Int[Array, "B S"], start: int | Int[Array, ""]
) -> Shaped[Array, "B S ..."]:
  """Picks the tokens at `index` of each row as far as a block holds them; zeros for the others.

  The sum of the results for all blocks of a row is the result of `gather_tokens`.

      row           a b c d; the block that starts at 2 is c d
      index         3 0 2
      result        d 0 c

  Args:
    block: consecutive tokens of each row.
    index: indices in the whole row.
    start: index in the whole row of the block's first token.
  """
  length = block.shape[1]
  is_here = (index >= start) & (index < start + length)
  return gather_tokens(block, jnp.where(is_here, index - start, length))
