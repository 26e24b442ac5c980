"""SwiGLU, the MLP of the decoder's layers (Shazeer 2020): down(silu(gate(x)) * up(x))."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float

_BLOCK_VALUES = 1 << 22  # 16 MiB in float32, half of the last cache of a CPU

Linear = Callable[[Array], Array]


def swiglu(
  x: Float[Array, "B T D"], gate: Linear, up: Linear, down: Linear, mlp_width: int
) -> Float[Array, "B T D"]:
  """Returns down(silu(gate(x)) * up(x)).

  On a CPU, XLA's matrix products are slower when their operands do not fit into its cache: two
  layers of the 2B took 1.12 times as long to read 4,096 tokens (median of six, on two cores). So
  there the rows are computed in blocks, sequentially.
  Other devices get all rows at once.

  Args:
    x: normalised hidden states.
    gate: maps D to M.
    up: maps D to M.
    down: maps M to D.
    mlp_width: M.
  """

  def apply(rows):
    """The MLP of any number of rows."""
    return down(jax.nn.silu(gate(rows)) * up(rows))

  block = max(1, _BLOCK_VALUES // mlp_width)
  if x.shape[0] * x.shape[1] <= block:
    return apply(x)

  def in_blocks(x):
    """The same, one block of rows after another."""
    rows = x.reshape(-1, x.shape[-1])
    whole = len(rows) - len(rows) % block
    blocks = jax.lax.map(apply, rows[:whole].reshape(-1, block, x.shape[-1]))
    rest = apply(rows[whole:])
    return jnp.concatenate([blocks.reshape(-1, x.shape[-1]), rest]).reshape(x.shape)

  return jax.lax.platform_dependent(x, cpu=in_blocks, default=apply)
