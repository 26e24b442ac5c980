"""How much attention each token receives from some of the other tokens; no values are mixed."""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops.blockwise import NOTHING
from videochat_flash_jax.ops.gather import gather_from_block, gather_tokens
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Bool, Float, Int

# Queries of a row at a time. Their weights are 8 N float32 per key, fewer than a token's channels.
_BLOCK_QUERIES = 8


def received_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  asks: Bool[Array, "B T"],
  segment_ids: Int[Array, "B T"],
  layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
  """Returns the causal attention weight of each token: its mean over heads and asking tokens.

      two tokens, both ask; the first gives itself weight 1, the second gives .3 and .7
      result   [(1 + .3) / 2, .7 / 2]

  An asking token counts in the mean of its whole segment, also for tokens that it does not see.
  Tokens that do not ask cost nothing: the queries of the asking tokens are gathered, and a few of
  each row are computed at a time, until all rows are done. On a mesh these few queries are sent to
  all devices of the row, and the softmax is taken over the keys of all these devices. Keys are not
  sent. Not differentiable.

  Args:
    q: queries, scaled already.
    k: keys, with K dividing N (grouped-query attention).
    asks: whether a token asks, that is, whether its attention counts.
    segment_ids: a token sees only its own segment.
    layout: how rows, tokens and heads are sharded; all arrays are in its order of tokens.

  Returns:
    The means, in float32 as the softmax is; 0 in segments where no token asks.
  """
  length = q.shape[1]
  positions = jnp.broadcast_to(layout.to_zigzag(jnp.arange(length)[None]), asks.shape)
  # Indices of the asking tokens of each row, padded with the length, which is no token's index.
  index = jnp.sort(jnp.where(asks, jnp.arange(length), length), axis=1)
  index = jnp.pad(index, ((0, 0), (0, _BLOCK_QUERIES)), constant_values=length)
  asking = index, gather_tokens(segment_ids, index), gather_tokens(positions, index)
  # The largest of all rows, so that all devices compute the same number of blocks.
  num_blocks = -(-asks.sum(axis=1).max() // _BLOCK_QUERIES)
  tokens, heads = ("batch", "sequence"), ("batch", "sequence", "heads")
  local = layout.shard_map(
    functools.partial(_received_on_device, length=length, layout=layout),
    (heads, heads, tokens, tokens, (("batch",),) * 3, ()),
    tokens,
  )
  return local(q, k, segment_ids, positions, asking, num_blocks)


def scores_of(queries: Float[Array, "B N H"], k: Float[Array, "#B T K H"]) -> Float[Array, "B N T"]:
  """The scores, before the softmax, that one query of each row gives the tokens, in float32.

  Args:
    queries: scaled already.
    k: keys, with K dividing N (grouped-query attention); those of one row count for all rows.
  """
  batch, num_heads, head_size = queries.shape
  k = jnp.broadcast_to(k, (batch, *k.shape[1:]))
  grouped = queries.reshape(batch, k.shape[2], -1, head_size)
  scores = jnp.einsum("bkgh,btkh->bkgt", grouped, k, preferred_element_type=jnp.float32)
  return scores.reshape(batch, num_heads, -1)


def _received_on_device(q, k, segment_ids, positions, asking, num_blocks, length, layout):
  """Means for this device's tokens, of the weights that the asking tokens of all devices give."""
  (batch, num_keys, _, head_size), num_kv_heads = q.shape, k.shape[2]
  start = layout.axis_index("sequence") * num_keys
  k = k.transpose(0, 2, 1, 3)

  def add_block(block, sums):
    """Adds the weights of one block of queries to the total, and their number to the count."""
    total, count = sums
    index, query_segments, query_positions = (
      jax.lax.dynamic_slice_in_dim(x, block * _BLOCK_QUERIES, _BLOCK_QUERIES, axis=1)
      for x in asking
    )
    is_asking = (index < length)[..., None]
    same = query_segments[..., None] == segment_ids[:, None]  # [B, queries, T]
    visible = same & (query_positions[..., None] >= positions[:, None])
    queries = layout.reduce_over(jax.lax.psum, gather_from_block(q, index, start), "sequence")
    queries = queries.reshape(batch, _BLOCK_QUERIES, num_kv_heads, -1, head_size)
    scores = jnp.einsum("bqkgh,bksh->bkgqs", queries, k, preferred_element_type=jnp.float32)
    weights = _softmax(jnp.where(visible[:, None, None], scores, NOTHING), layout)
    total += (weights.mean(axis=(1, 2)) * is_asking).sum(axis=1)
    count += (same & is_asking).sum(axis=1)
    return total, count

  zeros = jnp.zeros((batch, num_keys)), jnp.zeros((batch, num_keys), jnp.int32)
  total, count = jax.lax.fori_loop(0, num_blocks, add_block, zeros)
  return layout.reduce_over(jax.lax.pmean, total, "heads") / jnp.maximum(count, 1)


def _softmax(scores, layout):
  """Softmax over the keys, the last axis, of all devices that share a row."""
  highest = layout.reduce_over(jax.lax.pmax, scores.max(axis=-1, keepdims=True), "sequence")
  weights = jnp.exp(scores - highest)
  return weights / layout.reduce_over(jax.lax.psum, weights.sum(axis=-1, keepdims=True), "sequence")
