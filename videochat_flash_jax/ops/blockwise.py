"""Attention in tiles of some queries and some keys (FlashAttention, Dao 2023).

Memory grows with T + S and not with T x S: only the scores of one tile are there at a time. They
fit into the last cache of a CPU, for which this is made. A block of queries goes through the tiles
of its keys in order. It ends at the last key that one of its queries sees, so that causal attention
computes half of the scores, and a chunk behind a cache reads nothing of the cache's empty end.

    queries, in blocks of 4, against keys, in tiles of 4; causal    . not computed    m with a mask

              keys 0-3   4-7    8-11
    block 0   m          .      .
    block 1              m      .
    block 2                     m

The backward pass computes the scores of a tile again. From the forward pass it needs only the
result, and for each query the logarithm of the sum of the exponentials of its scores (log-sum-exp,
`lse`). With these two, attention can also be computed for parts of the keys, as a ring of devices
does (`ops/ring_attention.py`):

  result      `merge` combines the results for two parts of the keys
  gradients   each part of the keys adds its share, computed from the merged result and `lse`
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Bool, Float, Int

# A tile has 16 MiB of scores. One thread is as fast with 1 MiB, which fits the second-level cache
# of its core. But two threads share every step of a tile, and wait for each other at its end: on
# two cores a score then takes 1.9 ns, and 1.1 ns with these (4,096 queries behind 16,384 keys).
_TILE_QUERIES = 4096  # queries x heads of a group
_TILE_KEYS = 1024
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


class _Tile(NamedTuple):
  """Some keys and their values, of G key/value heads."""

  keys: Float[Array, "G S H"]
  values: Float[Array, "G S H"]
  index: Int[Array, "S"]
  is_new: Bool[Array, "S"]  # False for keys of the tile before
  segments: Int[Array, "G S"] | None


class _Tiles(NamedTuple):
  """The keys of G = B K key/value heads, cut into tiles; of one of them if `head` is given."""

  keys: Float[Array, "G S H"]
  values: Float[Array, "G S H"]
  segments: Int[Array, "G S"] | None
  size: int
  head: Int[Array, ""] | None = None

  def tile(self, number: Int[Array, ""]) -> _Tile:
    """Cuts a tile. The last one ends at the last key, and so may begin in the tile before it."""
    first = jnp.minimum(number * self.size, self.keys.shape[1] - self.size)

    def cut(x):
      """[G, S, ...] -> [1 or G, size, ...]."""
      head, num_heads = (0, len(x)) if self.head is None else (self.head, 1)
      rest = x.shape[2:]
      at = head, first, *(0 for _ in rest)
      return jax.lax.dynamic_slice(x, at, (num_heads, self.size, *rest))

    index = first + jnp.arange(self.size)
    segments = None if self.segments is None else cut(self.segments)
    is_new = index >= number * self.size
    return _Tile(cut(self.keys), cut(self.values), index, is_new, segments)

  def add_all(self, add_tile: Callable, sums: Any, queries: _Queries) -> Any:
    """Adds the tiles that a block of queries sees: those that all of them see without a mask.

    Of packed rows these are the tiles from the first to the last key whose segment lies between
    the lowest and the highest segment of the block.
    """
    num_keys = self.keys.shape[1]
    start, seen_by_all, end = 0, num_keys // self.size, -(-num_keys // self.size)
    if queries.order is not None:
      seen_by_all = jnp.clip((queries.order.min() + 1) // self.size, 0, seen_by_all)
      end = jnp.minimum(queries.order.max() // self.size + 1, end)
    if queries.segments is not None:
      segments = self.segments if self.head is None else self.segments[self.head]
      is_near = (queries.segments.min() <= segments) & (segments <= queries.segments.max())
      is_near = is_near.reshape(-1, num_keys).any(axis=0)
      start = seen_by_all = jnp.argmax(is_near) // self.size
      end = jnp.minimum((num_keys - 1 - jnp.argmax(is_near[::-1])) // self.size + 1, end)

    def add(masked, number, sums):
      return add_tile(self.tile(number), masked, sums)

    sums = jax.lax.fori_loop(start, seen_by_all, functools.partial(add, False), sums)
    return jax.lax.fori_loop(seen_by_all, end, functools.partial(add, True), sums)


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
  queries = _by_head(q, k, causal, query_order, query_segments)

  def of_heads(tiles, queries):
    """Results [G, n, R, H] and log-sum-exp [G, n, R] of all blocks of queries of G heads."""
    return _swapped(jax.lax.map(functools.partial(_attend_block, tiles), _swapped(queries)))

  tiles = _tiles(q, k, v, causal, key_segments)
  out, lse = _each_head(of_heads, tiles, queries, heads_at_once)
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
  queries = _by_head(q, k, causal, query_order, query_segments)
  gradient = gradient.astype(jnp.float32)
  # The softmax makes weights sum to one. So its gradient subtracts from each weight's gradient
  # their weighted mean, which is the product of the result and its gradient.
  mean = jnp.sum(merged.out * gradient, axis=-1)
  results = [_in_blocks(x, k) for x in (gradient, merged.lse, mean)]

  def of_heads(tiles, operands):
    """Gradients of all blocks of queries [G, n, R, H], of the keys and of the values [G, S, H]."""
    zeros = jnp.zeros((len(operands[0].vectors), k.shape[1], k.shape[3]), jnp.float32)
    backward_block = functools.partial(_backward_block, tiles)
    (d_k, d_v), d_q = jax.lax.scan(backward_block, (zeros, zeros), _swapped(operands))
    return _swapped(d_q), d_k, d_v

  tiles = _tiles(q, k, v, causal, key_segments)
  d_q, d_k, d_v = _each_head(of_heads, tiles, (queries, results), heads_at_once)
  d_k, d_v = (d.reshape(len(k), -1, *d.shape[1:]).swapaxes(1, 2) for d in (d_k, d_v))
  return _joined(d_q, q, k), d_k, d_v


def _each_head(function, tiles, operands, at_once):
  """Applies a function to tiles and operands [G, ...] of all key/value heads, or of one at a time.

  Operands and results are arrays [B * K, ...].
  """
  if at_once:
    return function(tiles, operands)

  def of_one_head(operands):
    head, operands = operands
    operands = jax.tree.map(lambda x: x[None], operands)
    return jax.tree.map(lambda x: x[0], function(tiles._replace(head=head), operands))

  num_heads = len(jax.tree.leaves(operands)[0])
  return jax.lax.map(of_one_head, (jnp.arange(num_heads), operands))


def _attend_block(tiles, queries):
  """Result [G, R, H] and log-sum-exp [G, R] of one block of queries."""

  def add_tile(tile, masked, sums):
    """Adds a tile to the sums, whose weights are relative to the highest score so far."""
    highest, total, out = sums
    scores = _scores(queries, tile, masked)
    higher = jnp.maximum(highest, scores.max(axis=-1))
    weights = jnp.exp(scores - higher[..., None])
    scale = jnp.exp(highest - higher)
    added = _products("grs,gsh->grh", weights.astype(tile.values.dtype), tile.values)
    return higher, scale * total + weights.sum(axis=-1), scale[..., None] * out + added

  zeros = jnp.zeros(queries.vectors.shape, jnp.float32)
  nothing = jnp.full(zeros.shape[:2], NOTHING), zeros[..., 0], zeros
  highest, total, out = tiles.add_all(add_tile, nothing, queries)
  seen = highest > NOTHING
  out = jnp.where(seen[..., None], out / total[..., None], 0)
  return out, jnp.where(seen, highest + jnp.log(total), NOTHING)


def _backward_block(tiles, sums, operands):
  """Adds a block's gradients of keys and values to `sums`, and gives that of its queries."""
  queries, (gradient, lse, mean) = operands
  vectors = queries.vectors.astype(jnp.float32)

  def add_tile(tile, masked, sums):
    """Adds a tile to the gradients of the block's queries, and of all keys and values."""
    d_q, d_k, d_v = sums
    weights = jnp.exp(_scores(queries, tile, masked) - lse[..., None])
    d_weights = _products("grh,gsh->grs", gradient, tile.values.astype(jnp.float32))
    d_scores = weights * (d_weights - mean[..., None])
    d_q += _products("grs,gsh->grh", d_scores, tile.keys.astype(jnp.float32))
    d_k = _added(d_k, tile.index[0], _products("grs,grh->gsh", d_scores, vectors))
    d_v = _added(d_v, tile.index[0], _products("grs,grh->gsh", weights, gradient))
    return d_q, d_k, d_v

  d_q, *sums = tiles.add_all(add_tile, (jnp.zeros(vectors.shape), *sums), queries)
  return tuple(sums), d_q


def _added(sums, first, part):
  """Adds [G, s, H] to a part of [G, S, H]."""
  old = jax.lax.dynamic_slice_in_dim(sums, first, part.shape[1], axis=1)
  return jax.lax.dynamic_update_slice_in_dim(sums, old + part, first, axis=1)


def _scores(queries, tile, masked):
  """Products [G, R, s] in float32; if masked, far below `NOTHING` where a query sees no key."""
  scores = _products("grh,gsh->grs", queries.vectors, tile.keys)
  if not masked:
    return scores
  visible = tile.is_new
  if queries.order is not None:
    visible &= queries.order[..., None] >= tile.index
  if queries.segments is not None:
    visible &= queries.segments[..., None] == tile.segments[:, None]
  return jnp.where(visible, scores, 2 * NOTHING)


def _products(subscripts, x, y):
  return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _tiles(q, k, v, causal, key_segments):
  """The `_Tiles` of all heads."""
  num_keys, rows = k.shape[1], q.shape[1] * q.shape[2] // k.shape[2]
  # Tiles of few queries have more keys: 64 queries of 60,000 keys then take two thirds of the time.
  most = _TILE_KEYS * min(4, max(1, _TILE_QUERIES // rows))
  if causal:  # eight tiles at least: the fewer they are, the more scores are masked
    most = min(most, max(_TILE_KEYS // 2, num_keys // 8))
  elif num_keys <= 4 * _TILE_KEYS:  # one tile if possible, whose sums are not scaled for the next
    most = num_keys
  segments = None if key_segments is None else _heads_first(_repeated(key_segments, k))
  return _Tiles(_heads_first(k), _heads_first(v), segments, _equal_parts(num_keys, most))


def _heads_first(x):
  """[B, S, K, ...] -> [B * K, S, ...], as caches hold their keys: then nothing is copied."""
  return x.swapaxes(1, 2).reshape(-1, x.shape[1], *x.shape[3:])


def _equal_parts(length, most):
  """Length of parts of at most so many. They are equal, as a short last one would be a waste."""
  return -(-length // -(-length // most))


def _swapped(arrays):
  """Exchanges the first two axes of all arrays of a tree."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1), arrays)


def _by_head(q, k, causal, query_order, query_segments):
  """`_Queries` with B * K heads along a new first axis."""

  def of_queries(x):
    """An array [#B, T] for all heads, in blocks."""
    return x if x is None else _in_blocks(_repeated(x, q), k)

  order = order_among_keys(q, causal, query_order)
  return _Queries(_in_blocks(q, k), of_queries(order), of_queries(query_segments))


def _repeated(x, like):
  """Repeats an array [#B, T] for all rows and heads of another: [B, T, heads]."""
  return jnp.broadcast_to(x[..., None], like.shape[:3])


def _in_blocks(x, k):
  """[B, T, N, ...] -> [B * K, n, R, ...]; the last block is padded with zeros.

  Queries and heads of a group share an axis: with two, XLA on the CPU would transpose all keys.
  """
  (batch, length, num_heads, *rest), num_kv_heads = x.shape, k.shape[2]
  group = num_heads // num_kv_heads
  block = _equal_parts(length, max(1, _TILE_QUERIES // group))
  x = jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2))
  x = x.reshape(batch, -1, num_kv_heads, group, *rest).swapaxes(1, 2)
  return x.reshape(batch * num_kv_heads, -1, block * group, *rest)


def _joined(x, q, k):
  """The inverse of `_in_blocks`: [B * K, n, R, ...] -> [B, T, N, ...]."""
  batch, length, num_heads, _ = q.shape
  num_kv_heads, rest = k.shape[2], x.shape[3:]
  x = x.reshape(batch, num_kv_heads, -1, num_heads // num_kv_heads, *rest).swapaxes(1, 2)
  return x[:, :length].reshape(batch, length, num_heads, *rest)
