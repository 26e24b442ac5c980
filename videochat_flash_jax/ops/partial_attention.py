"""Attention to a part of the keys, to be merged with that to other parts.

Softmax over all keys follows from softmax over parts of them, if each part also tells the logarithm
of its sum of exponentials (`lse`). Its gradient follows from the merged result and the merged `lse`
alone, part by part (FlashAttention, Dao 2023). Both take blocks of queries one after another, so
that memory grows with T + S and not with T x S.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK_SCORES = 1 << 20  # scores of a block and head: 4 MiB in float32
_BLOCK_QUERIES = 32  # queries of a block at least
NOTHING = -1e30  # lse of a query that sees no key; finite, lest differences of two give NaN


class Partial(NamedTuple):
  """Attention of each query to a part of the keys; float32."""

  out: Float[Array, "B T N H"]
  lse: Float[Array, "B T N"]


def merge(one: Partial, other: Partial) -> Partial:
  """Attention to the keys of both parts."""
  lse = jnp.logaddexp(one.lse, other.lse)
  # Where neither sees a key the shares are finite, and of zeros.
  shares = (jnp.exp(part.lse - lse)[..., None] * part.out for part in (one, other))
  return Partial(sum(shares), lse)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  *,
  diagonal: bool,
) -> Partial:
  """Attends to one part of the keys.

  Args:
    q: queries; head n reads key/value head n // (N / K).
    k: keys.
    v: values.
    query_segments: a query sees the keys of its own segment only.
    key_segments: see `query_segments`.
    diagonal: queries and keys are the same tokens, and none sees a later one.
  """

  def one_block(operands):
    q_block, segments, start = operands
    scores = _scores(q_block, k, segments, key_segments, start, diagonal)
    highest = jnp.maximum(scores.max(axis=-1, keepdims=True), NOTHING)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
      "bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    seen = total > 0
    lse = jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1)), NOTHING)
    total = jnp.where(seen, total, 1)[..., 0].transpose(0, 3, 1, 2)[..., None]
    return mixed / total, lse[..., 0].transpose(0, 3, 1, 2)

  blocks = _query_blocks((_grouped(q, k), query_segments), k.shape[1])
  out, lse = _joined(jax.lax.map(one_block, blocks), q.shape[1])
  return Partial(out.reshape(q.shape), lse.reshape(q.shape[:3]))


def attend_backward(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  merged: Partial,
  gradient: Float[Array, "B T N H"],
  *,
  diagonal: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """What one part of the keys adds to the gradients of q, k and v, in float32.

  Args:
    q: queries, as `attend` got them.
    k: keys of the part.
    v: values of the part.
    query_segments: see `attend`.
    key_segments: see `attend`.
    diagonal: see `attend`.
    merged: attention of the queries to all keys.
    gradient: of the merged result.
  """
  scale = q.shape[-1] ** -0.5
  # The gradient of a softmax takes from every score what the result as a whole gains.
  gain = jnp.sum(merged.out * gradient, axis=-1)

  def one_block(sums, operands):
    (q_block, gradient, lse, gain, segments, start) = operands
    scores = _scores(q_block, k, segments, key_segments, start, diagonal)
    weights = jnp.exp(scores - lse.transpose(0, 2, 3, 1)[..., None])
    weights = jnp.where(scores > NOTHING, weights, 0)
    d_v = jnp.einsum("bkgts,btkgh->bskh", weights, gradient)
    d_weights = jnp.einsum("btkgh,bskh->bkgts", gradient, v.astype(jnp.float32))
    d_scores = weights * (d_weights - gain.transpose(0, 2, 3, 1)[..., None]) * scale
    d_q = jnp.einsum("bkgts,bskh->btkgh", d_scores, k.astype(jnp.float32))
    d_k = jnp.einsum("bkgts,btkgh->bskh", d_scores, q_block.astype(jnp.float32))
    return jax.tree.map(jnp.add, sums, (d_k, d_v)), d_q

  grouped = [_grouped(x, k) for x in (q, gradient.astype(jnp.float32), merged.lse, gain)]
  zeros = jnp.zeros_like(k, dtype=jnp.float32), jnp.zeros_like(v, dtype=jnp.float32)
  blocks = _query_blocks((*grouped, query_segments), k.shape[1])
  (d_k, d_v), d_q = jax.lax.scan(one_block, zeros, blocks)
  return _joined(d_q, q.shape[1]).reshape(q.shape), d_k, d_v


def _scores(q, k, query_segments, key_segments, start, diagonal):
  """Scaled products [B, K, G, T, S] in float32, far below `NOTHING` where a key is not seen."""
  visible = query_segments[:, :, None] == key_segments[:, None, :]
  if diagonal:
    order = start + jnp.arange(q.shape[1])
    visible &= order[:, None] >= jnp.arange(k.shape[1])
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
  return jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, 2 * NOTHING)


def _grouped(x, k):
  """Query heads beside the key head that they read: [B, T, N, ...] to [B, T, K, N / K, ...]."""
  num_kv_heads = k.shape[2]
  return x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])


def _query_blocks(arrays, num_keys):
  """Arrays [B, T, ...] in blocks [blocks, B, block, ...], and the first query of each block."""
  length = arrays[0].shape[1]
  block = min(length, max(_BLOCK_QUERIES, _BLOCK_SCORES // num_keys))
  num_blocks = -(-length // block)

  def in_blocks(x):
    padding = [(0, 0), (0, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding)
    return x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]).swapaxes(0, 1)

  return (*(in_blocks(x) for x in arrays), jnp.arange(num_blocks) * block)


def _joined(blocks, length):
  """The inverse of `_query_blocks`, for every array of a tree."""

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

  return jax.tree.map(join, blocks)
