"""How much attention each token gets from some of the others, without their values."""

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.shapes import Array, Bool, Float, Int

_BLOCK_QUERIES = (
  8  # of a row at a time: their weights, 8 N float32 a token, are fewer than its width
)
_MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN


def received_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  asks: Bool[Array, "B T"],
  segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T"]:
  """Causal attention weights that each token gets: the mean over heads and over those that ask.

      two tokens, both ask: the first gives itself 1; the second gives .3 and .7
      result   [(1 + .3) / 2, .7 / 2]

  A token that asks counts in the mean of its whole segment, also where it sees nothing. Queries
  that do not ask cost nothing: those that do are gathered and visited a few at a time, up to the
  row that has most. Not differentiable.

  Args:
    q: queries.
    k: keys, with K dividing N (grouped-query attention).
    asks: which tokens ask.
    segment_ids: a token sees only its own segment.

  Returns:
    The means, in float32 as the softmax is; 0 in segments where nobody asks.
  """
  (batch, length, _, head_size), num_kv_heads = q.shape, k.shape[2]
  order = jnp.argsort(~asks, axis=1, stable=True)
  order = jnp.pad(order, ((0, 0), (0, _BLOCK_QUERIES)), constant_values=length)
  num_asking = asks.sum(axis=1)
  k = k.transpose(0, 2, 1, 3)

  def add_block(block, sums):
    total, count = sums
    rows = jax.lax.dynamic_slice_in_dim(order, block * _BLOCK_QUERIES, _BLOCK_QUERIES, axis=1)
    asking = block * _BLOCK_QUERIES + jnp.arange(_BLOCK_QUERIES) < num_asking[:, None]
    same = gather_tokens(segment_ids, rows)[..., None] == segment_ids[:, None]  # [B, rows, T]
    visible = same & (rows[..., None] >= jnp.arange(length))
    queries = gather_tokens(q, rows) * jnp.asarray(head_size**-0.5, q.dtype)
    queries = queries.reshape(batch, _BLOCK_QUERIES, num_kv_heads, -1, head_size)
    scores = jnp.einsum("bqkgh,bksh->bkgqs", queries, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1)
    total += (weights.mean(axis=(1, 2)) * asking[..., None]).sum(axis=1)
    count += (same & asking[..., None]).sum(axis=1)
    return total, count

  num_blocks = -(-num_asking.max() // _BLOCK_QUERIES)
  nothing = jnp.zeros((batch, length)), jnp.zeros((batch, length), jnp.int32)
  total, count = jax.lax.fori_loop(0, num_blocks, add_block, nothing)
  return total / jnp.maximum(count, 1)
