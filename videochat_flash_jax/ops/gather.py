"""Tokens picked out of rows."""

import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.shapes import Array, Int, Shaped


def gather_tokens(
  x: Shaped[Array | np.ndarray, "B T ..."], index: Int[Array | np.ndarray, "B S"], fill: int = 0
) -> Shaped[Array, "B S ..."]:
  """Picks the tokens at `index` of each row; `fill` stands where the index is beyond the row.

  gather_tokens([[a, b, c]], [[2, 0, 3]]) = [[c, a, 0]]
  """
  index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)
