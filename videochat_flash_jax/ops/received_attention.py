"""How much attention each token gets from some of the others, without their values."""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops.gather import gather_from_block, gather_tokens
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
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
  layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
  """Causal attention weights that each token gets: the mean over heads and over those that ask.

      two tokens, both ask: the first gives itself 1; the second gives .3 and .7
      result   [(1 + .3) / 2, .7 / 2]

  A token that asks counts in the mean of its whole segment, also where it sees nothing. Queries
  that do not ask cost nothing: those that do are gathered and visited a few at a time, up to the
  row that has most. On a mesh these few are sent to all devices of the row, and the softmax is
  taken over the keys of all; keys stay where they are. Not differentiable.

  Args:
    q: queries.
    k: keys, with K dividing N (grouped-query attention).
    asks: which tokens ask.
    segment_ids: a token sees only its own segment.
    layout: how rows, tokens and heads lie on a mesh; all arrays are in its order of tokens.

  Returns:
    The means, in float32 as the softmax is; 0 in segments where nobody asks.
  """
  length = q.shape[1]
  places = jnp.broadcast_to(layout.to_zigzag(jnp.arange(length)[None]), asks.shape)
  # Indices of those that ask; behind them the length, which stands for nobody.
  rows = jnp.sort(jnp.where(asks, jnp.arange(length), length), axis=1)
  rows = jnp.pad(rows, ((0, 0), (0, _BLOCK_QUERIES)), constant_values=length)
  asking = rows, gather_tokens(segment_ids, rows), gather_tokens(places, rows)
  # Over all rows, so that all devices go through their blocks together.
  num_blocks = -(-asks.sum(axis=1).max() // _BLOCK_QUERIES)
  tokens, heads = ("batch", "sequence"), ("batch", "sequence", "heads")
  local = layout.shard_map(
    functools.partial(_received_on_device, length=length, layout=layout),
    (heads, heads, tokens, tokens, (("batch",),) * 3, ()),
    tokens,
  )
  return local(q, k, segment_ids, places, asking, num_blocks)


def _received_on_device(q, k, segment_ids, places, asking, num_blocks, length, layout):
  (batch, num_keys, _, head_size), num_kv_heads = q.shape, k.shape[2]
  start = layout.axis_index("sequence") * num_keys
  k = k.transpose(0, 2, 1, 3)

  def add_block(block, sums):
    total, count = sums
    rows, row_segments, row_places = (
      jax.lax.dynamic_slice_in_dim(x, block * _BLOCK_QUERIES, _BLOCK_QUERIES, axis=1)
      for x in asking
    )
    is_asking = (rows < length)[..., None]
    same = row_segments[..., None] == segment_ids[:, None]  # [B, rows, T]
    visible = same & (row_places[..., None] >= places[:, None])
    queries = layout.reduce_over(jax.lax.psum, gather_from_block(q, rows, start), "sequence")
    queries = queries * jnp.asarray(head_size**-0.5, q.dtype)
    queries = queries.reshape(batch, _BLOCK_QUERIES, num_kv_heads, -1, head_size)
    scores = jnp.einsum("bqkgh,bksh->bkgqs", queries, k, preferred_element_type=jnp.float32)
    weights = _softmax(jnp.where(visible[:, None, None], scores, _MASKED), layout)
    total += (weights.mean(axis=(1, 2)) * is_asking).sum(axis=1)
    count += (same & is_asking).sum(axis=1)
    return total, count

  nothing = jnp.zeros((batch, num_keys)), jnp.zeros((batch, num_keys), jnp.int32)
  total, count = jax.lax.fori_loop(0, num_blocks, add_block, nothing)
  return layout.reduce_over(jax.lax.pmean, total, "heads") / jnp.maximum(count, 1)


def _softmax(scores, layout):
  """Over the keys, the last axis, of all devices that share a row."""
  highest = layout.reduce_over(jax.lax.pmax, scores.max(axis=-1, keepdims=True), "sequence")
  weights = jnp.exp(scores - highest)
  return weights / layout.reduce_over(jax.lax.psum, weights.sum(axis=-1, keepdims=True), "sequence")
