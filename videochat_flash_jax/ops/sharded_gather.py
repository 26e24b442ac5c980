"""Picks tokens out of rows that may be sharded over a mesh; no device ever holds a whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.ops.gather import gather_from_block, gather_tokens
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_gather(
  x: Float[Array, "B T D"], positions: Int[Array | np.ndarray, "B S"], layout: Layout
) -> Float[Array, "B S D"]:
  """Picks tokens as `gather_tokens` does, and splits them evenly over the devices again.

  Each device's tokens are sent round the ring, one device further in each step, and every device
  takes those that it needs. Gradients are sent in the same way, each to the device that its token
  came from.

      two devices hold      a b | c d
      positions             1 2 3 4        4 is beyond the row: zeros
      they hold then        b c | d 0

  Args:
    x: a row's tokens, in the order of the layout.
    positions: positions in the text of the tokens to pick, in the order of the text. None occurs
      twice, except positions beyond the row.
    layout: how tokens are sharded, before and after.
  """
  length = x.shape[1]
  stored_at = layout.from_zigzag(jnp.arange(length)[None])[0]  # index of each position in x
  index = layout.to_zigzag(jnp.take(stored_at, positions, mode="fill", fill_value=length))
  local = gather_tokens
  if layout.sequence_shards > 1:
    local = functools.partial(_ring_gather, shards=layout.sequence_shards)
  tokens = ("batch", "sequence")
  return layout.shard_map(local, (tokens, tokens), tokens)(x, index)


def _forward(x, positions, layout):
  return sharded_gather(x, positions, layout), _inverse(positions, x.shape[1])


def _backward(layout, inverse, gradient):
  return sharded_gather(gradient, inverse, layout), None


sharded_gather.defvjp(_forward, _backward)


def _inverse(positions, length):
  """The positions that pick the tokens back; for a token that was not picked, one beyond the row.

  Picking [1 3 4] of 4 tokens gives [b d 0]; [3 0 3 1] picks [0 b 0 d] out of these.
  """
  num_picked = positions.shape[1]
  row = jnp.full(length, num_picked)
  return jax.vmap(lambda of_row: row.at[of_row].set(jnp.arange(num_picked), mode="drop"))(positions)


def _ring_gather(x, index, shards):
  """Picks this device's tokens out of the tokens of all devices."""
  from_next = [*range(1, shards), 0]

  def take(block, steps):
    """The needed tokens of a block that was sent so many steps; zeros for the others."""
    owner = (jax.lax.axis_index("sequence") + steps) % shards
    return gather_from_block(block, index, owner * x.shape[1])

  def step(carry, steps):
    """Takes tokens of one block while the next block is sent."""
    taken, block = carry
    next_block = jax.lax.pshuffle(block, "sequence", from_next)
    return (taken + take(block, steps), next_block), None

  zeros = jnp.zeros((*index.shape, x.shape[2]), x.dtype)
  (taken, block), _ = jax.lax.scan(step, (zeros, x), jnp.arange(shards - 1))
  return taken + take(block, shards - 1)
