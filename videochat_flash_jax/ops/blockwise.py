"""Attention in blocks of queries, so that memory grows with T + S and not with T x S.

The scores of one block of queries with one key/value head are in memory at a time, or those of all
heads if the caller says so. The scores of one head fit into the cache of a CPU's core, for which
this is made.

The backward pass computes the scores of a block again (FlashAttention, Dao 2023). From the forward
pass it needs only the result, and for each query the logarithm of the sum of the exponentials of
its scores (log-sum-exp, `lse`). With these two, attention can also be computed for parts of the
keys, as a ring of devices does (`ops/ring_attention.py`):

  result      `merge` combines the results for two parts of the keys
  gradients   each part of the keys adds its share, computed from the merged result and `lse`
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK_SCORES = 1 << 20  # scores in a block: 4 MiB in float32, about the cache of a core
_BLOCK_QUERIES = 32  # queries in a block at least; with fewer, reading the keys takes longest
NOTHING = -1e30  # lse of a query that sees no key; finite, because -inf - -inf is NaN


class Partial(NamedTuple):
  """Attention of each query to a part of the keys."""

  out: Float[Array, "B T N H"]
  lse: Float[Array, "B T N"]


class _Queries(NamedTuple):
  """Queries of one key/value head, in n blocks of R vectors (queries x heads of the group)."""

  vectors: Float[Array, "n R H"]
  order: Int[Array, "n R"] | None
  segments: Int[Array, "n R"] | None


class _Keys(NamedTuple):
  """One head of keys and values."""

  keys: Float[Array, "S H"]
  values: Float[Array, "S H"]
  segments: Int[Array, "S"] | None


def merge(one: Partial, other: Partial) -> Partial:
  """Returns the attention to the keys of both parts."""
  lse = jnp.logaddexp(one.lse, other.lse)
  # Where a query sees no key of either part, both shares are finite and both results are zeros.
  shares = (jnp.exp(part.lse - lse)[..., None] * part.out for part in (one, other))
  return Partial(sum(shares), lse)


def order_among_keys(
  q: Float[Array, "B T N H"], causal: bool, query_order: Int[Array, "#B T"] | None
) -> Int[Array, "#B T"] | None:
  """Returns the index of each query among the keys; None if all queries see all keys."""
  if not causal:
    return None
  return jnp.arange(q.shape[1])[None] if query_order is None else query_order


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  causal: bool,
  query_order: Int[Array, "#B T"] | None,
  query_segments: Int[Array, "B T"] | None,
  key_segments: Int[Array, "B S"] | None,
  *,
  heads_at_once: bool = False,
) -> Partial:
  """Attends to keys that may be a part of all keys.

  The arguments are those of `ops.attention.attention`; and `heads_at_once` computes all key/value
  heads of a block together instead of one after another.

  Returns:
    Result and log-sum-exp in float32; zeros and `NOTHING` for a query that sees no key.
  """
  block = _block_size(q, k)
  operands = _by_head(q, k, v, causal, query_order, query_segments, key_segments, block)
  spans = list(_spans(q, k, block, in_order=causal and query_order is None))

  def one_head(operands):
    """Results [n, R, H] and log-sum-exp [n, R] of all blocks of queries."""
    queries, keys = operands
    results = [
      jax.lax.map(functools.partial(_attend_block, _cut(keys, seen)), _cut(queries, blocks))
      for blocks, seen in spans
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

  out, lse = _each_head(one_head, operands, heads_at_once)
  return Partial(_joined(out, q, k), _joined(lse, q, k))


def attend_backward(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  causal: bool,
  query_order: Int[Array, "#B T"] | None,
  query_segments: Int[Array, "B T"] | None,
  key_segments: Int[Array, "B S"] | None,
  merged: Partial,
  gradient: Float[Array, "B T N H"],
  *,
  heads_at_once: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Returns what these keys add to the gradients of q, k and v, in float32.

  Args:
    q: as given to `attend`, like all arguments but the last two.
    k: keys of the part.
    v: values of the part.
    causal: see `attend`.
    query_order: see `attend`.
    query_segments: see `attend`.
    key_segments: see `attend`.
    merged: attention of the queries to the keys of all parts.
    gradient: gradient of the loss with respect to `merged.out`.
    heads_at_once: see `attend`.
  """
  block = _block_size(q, k)
  operands = _by_head(q, k, v, causal, query_order, query_segments, key_segments, block)
  spans = list(_spans(q, k, block, in_order=causal and query_order is None))
  gradient = gradient.astype(jnp.float32)
  # The softmax makes weights sum to one. So its gradient subtracts from each weight's gradient
  # their weighted mean, which is the product of the result and its gradient.
  mean = jnp.sum(merged.out * gradient, axis=-1)
  results = [_in_blocks(x, k.shape[2], block) for x in (gradient, merged.lse, mean)]

  def one_head(operands):
    """Gradients of all blocks of queries [n, R, H], of the keys and of the values [S, H]."""
    (queries, keys), results = operands
    d_q, d_k, d_v = [], 0, 0
    for blocks, seen in spans:
      seen_keys = _cut(keys, seen)
      zeros = jnp.zeros(seen_keys.keys.shape, jnp.float32)
      (span_k, span_v), span_q = jax.lax.scan(
        functools.partial(_backward_block, seen_keys),
        (zeros, zeros),
        _cut((queries, results), blocks),
      )
      d_q.append(span_q)
      unseen = (0, len(keys.keys) - len(span_k)), (0, 0)
      d_k, d_v = d_k + jnp.pad(span_k, unseen), d_v + jnp.pad(span_v, unseen)
    return jnp.concatenate(d_q), d_k, d_v

  d_q, d_k, d_v = _each_head(one_head, (operands, results), heads_at_once)
  d_k, d_v = (d.reshape(len(k), -1, *d.shape[1:]).swapaxes(1, 2) for d in (d_k, d_v))
  return _joined(d_q, q, k), d_k, d_v


def _each_head(function, operands, at_once):
  """Applies a function to the operands of every key/value head, which stand along axis 0."""
  return jax.vmap(function)(operands) if at_once else jax.lax.map(function, operands)


def _attend_block(keys, queries):
  """Result [R, H] and log-sum-exp [R] of one block of queries."""
  scores, values = _scores(queries, keys), keys.values
  highest = scores.max(axis=-1)
  weights = jnp.exp(scores - highest[:, None])
  total = weights.sum(axis=-1)
  out = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
  # Divided after the product: S times fewer divisions, and no second pass over the weights.
  out = out / total[:, None]
  seen = highest > NOTHING  # else a mean of all values
  return jnp.where(seen[:, None], out, 0), jnp.where(seen, highest + jnp.log(total), NOTHING)


def _backward_block(keys, sums, operands):
  """Adds a block's gradients of keys and values to `sums`, and gives that of its queries."""
  queries, (gradient, lse, mean) = operands
  d_k, d_v = sums
  weights = jnp.exp(_scores(queries, keys) - lse[:, None])
  d_weights = jnp.einsum("rh,sh->rs", gradient, keys.values.astype(jnp.float32))
  d_scores = weights * (d_weights - mean[:, None])
  d_q = d_scores @ keys.keys.astype(jnp.float32)
  d_k += d_scores.T @ queries.vectors.astype(jnp.float32)
  d_v += weights.T @ gradient
  return (d_k, d_v), d_q


def _scores(queries, keys):
  """Products [R, S] in float32, far below `NOTHING` where a query does not see a key."""
  scores = jnp.einsum("rh,sh->rs", queries.vectors, keys.keys, preferred_element_type=jnp.float32)
  if queries.order is not None:
    is_before = queries.order[:, None] >= jnp.arange(len(keys.keys))
    scores = jnp.where(is_before, scores, 2 * NOTHING)
  if queries.segments is not None:
    is_same = queries.segments[:, None] == keys.segments
    scores = jnp.where(is_same, scores, 2 * NOTHING)
  return scores


def _block_size(q, k):
  """Queries in a block. Blocks are equal, because a short last one would be mostly padding."""
  length, num_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
  most = max(_BLOCK_QUERIES, _BLOCK_SCORES // (num_keys * group))
  return -(-length // -(-length // most))


def _spans(q, k, block, *, in_order) -> Iterator[tuple[slice, slice]]:
  """Yields which blocks of queries attend to which keys.

  Queries in array order see no key after themselves. So a span of them needs only the keys up to
  its end, and eight spans save 7/16 of the products.

      8 blocks of 4 queries    span 1: block 0, keys 0-3; span 2: block 1, keys 0-7; and so on
  """
  num_blocks, num_keys = -(-q.shape[1] // block), k.shape[1]
  step = -(-num_blocks // 8) if in_order else num_blocks
  for first in range(0, num_blocks, step):
    last = min(first + step, num_blocks)
    yield slice(first, last), slice(min(last * block, num_keys) if in_order else num_keys)


def _cut(arrays: Any, part: slice):
  """A part of all arrays of a tree, along the first axis."""
  return jax.tree.map(lambda x: x[part], arrays)


def _by_head(q, k, v, causal, query_order, query_segments, key_segments, block):
  """`_Queries` and `_Keys` with B * K heads along a new first axis."""

  def of_queries(x):
    """An array [#B, T] for all heads, in blocks."""
    return x if x is None else _in_blocks(_repeated(x, q), k.shape[2], block)

  def of_keys(x):
    """[B, S, K, ...] -> [B * K, S, ...]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], *x.shape[3:])

  queries = _Queries(
    _in_blocks(q, k.shape[2], block),
    of_queries(order_among_keys(q, causal, query_order)),
    of_queries(query_segments),
  )
  if key_segments is not None:
    key_segments = of_keys(_repeated(key_segments, k))
  return queries, _Keys(of_keys(k), of_keys(v), key_segments)


def _repeated(x, like):
  """Repeats an array [#B, T] for all rows and heads of another: [B, T, heads]."""
  return jnp.broadcast_to(x[..., None], like.shape[:3])


def _in_blocks(x, num_kv_heads, block):
  """[B, T, N, ...] -> [B * K, n, R, ...]; the last block is padded with zeros.

  Queries and heads of a group share an axis: with two, XLA on the CPU would transpose all keys.
  """
  batch, length, num_heads, *rest = x.shape
  x = jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2))
  x = x.reshape(batch, -1, num_kv_heads, num_heads // num_kv_heads, *rest).swapaxes(1, 2)
  return x.reshape(batch * num_kv_heads, -1, block * (num_heads // num_kv_heads), *rest)


def _joined(x, q, k):
  """The inverse of `_in_blocks`: [B * K, n, R, ...] -> [B, T, N, ...]."""
  batch, length, num_heads, _ = q.shape
  num_kv_heads, rest = k.shape[2], x.shape[3:]
  x = x.reshape(batch, num_kv_heads, -1, num_heads // num_kv_heads, *rest).swapaxes(1, 2)
  return x[:, :length].reshape(batch, length, num_heads, *rest)
