"""Tokens picked out of rows that may be spread over a mesh; no device ever holds a whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.ops.gather import gather_from_block, gather_tokens
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_gather(
  x: Float[Array, "B T D"], places: Int[Array | np.ndarray, "B S"], layout: Layout
) -> Float[Array, "B S D"]:
  """Picks tokens as `gather_tokens` does, and spreads them evenly over the devices again.

  Each device's tokens travel round the ring, one hop at a time, and every device takes those it
  needs as they pass. Gradients travel likewise, each back to where its token came from.

      two devices hold      a b | c d
      places                1 2 3 4        in the order of the text; beyond the row: zeros
      they hold then        b c | d 0

  Args:
    x: a row's tokens, in the order of the layout.
    places: which tokens stand where, both counted in the order of the text; none of them twice.
    layout: how tokens lie on a mesh, before and after.
  """
  length = x.shape[1]
  stored_at = layout.from_zigzag(jnp.arange(length)[None])[0]  # by place in the text
  index = layout.to_zigzag(jnp.take(stored_at, places, mode="fill", fill_value=length))
  local = gather_tokens
  if layout.sequence_shards > 1:
    local = functools.partial(_ring_gather, shards=layout.sequence_shards)
  tokens = ("batch", "sequence")
  return layout.shard_map(local, (tokens, tokens), tokens)(x, index)


def _forward(x, places, layout):
  return sharded_gather(x, places, layout), _places_before(places, x.shape[1])


def _backward(layout, places, gradient):
  return sharded_gather(gradient, places, layout), None


sharded_gather.defvjp(_forward, _backward)


def _places_before(places, length):
  """By which places tokens are put back: [1 3 4] of 4 tokens gives [3 0 3 1], with 3 for zeros."""
  num_picked = places.shape[1]
  row = jnp.full(length, num_picked)
  return jax.vmap(lambda places: row.at[places].set(jnp.arange(num_picked), mode="drop"))(places)


def _ring_gather(x, index, shards):
  from_the_next = [*range(1, shards), 0]

  def take(block, hops):
    owner = (jax.lax.axis_index("sequence") + hops) % shards
    return gather_from_block(block, index, owner * x.shape[1])

  def hop(carry, hops):
    taken, block = carry
    arriving = jax.lax.pshuffle(block, "sequence", from_the_next)  # under way while we take
    return (taken + take(block, hops), arriving), None

  nothing = jnp.zeros((*index.shape, x.shape[2]), x.dtype)
  (taken, block), _ = jax.lax.scan(hop, (nothing, x), jnp.arange(shards - 1))
  return taken + take(block, shards - 1)
