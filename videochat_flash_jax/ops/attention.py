"""Softmax attention: one contract, four implementations.

| name        | where                   | scores in memory | cases                                 |
|-------------|-------------------------|------------------|---------------------------------------|
| `dense`     | anywhere; the reference | T x S            | all                                   |
| `blockwise` | anywhere, made for CPUs | a block          | all                                   |
| `cudnn`     | NVIDIA GPUs from Ampere | none             | 16 bits, no segments, no order; the   |
|             |                         |                  | others are left to `blockwise`        |
| `splash`    | TPUs (`ops/splash.py`)  | none             | all                                   |

`blockwise` visits one key/value head and a block of queries at a time, so that scores stay in the
cache of a CPU. On more than one TPU `splash` has to be called inside `jax.shard_map`: the compiler
cannot split a kernel.
"""

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops import splash
from videochat_flash_jax.ops.platform import target_platform
from videochat_flash_jax.shapes import Array, Float, Int

_DENSE_SCORES = 256 * 256  # up to this many scores a head, one dense product is faster
_BLOCK_SCORES = 1 << 20  # scores of a block: 4 MiB in float32, about a core's cache
_BLOCK_QUERIES = 32  # queries of a block at least, lest the products wait for the keys
_MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  causal: bool = False,
  query_order: Int[Array, "#B T"] | None = None,
  query_segments: Int[Array, "B T"] | None = None,
  key_segments: Int[Array, "B S"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N H"]:
  """Attends with softmax(q k / sqrt(H)) v; query head n reads key/value head n // (N / K).

  Args:
    q: queries.
    k: keys, with K dividing N (grouped-query attention).
    v: values.
    causal: a query sees only the keys whose index is at most its order.
    query_order: index of each query among the keys, where it is not its own index (a chunk
      that continues a cache). Only read when `causal`.
    query_segments: with `key_segments`, a query sees only keys of its own segment (packing).
    key_segments: see `query_segments`.
    implementation: "dense", "blockwise", "cudnn", "splash", or None to choose by size and by the
      device that the program is traced for.

  Returns:
    One vector per query and head, in the dtype of `q`. Scores and softmax are float32.
  """
  if implementation is None:
    small = q.shape[1] == 1 or q.shape[1] * k.shape[1] <= _DENSE_SCORES
    implementation = "dense" if small else _fastest()
  run = _IMPLEMENTATIONS[implementation]
  return run(q, k, v, causal, query_order, query_segments, key_segments)


def _fastest():
  """The implementation for the device that the program is traced for."""
  platform = target_platform()
  if platform == "gpu":
    capability = jax.devices()[0].compute_capability  # "8.0" for Ampere; AMD's are no numbers
    is_ampere = capability.replace(".", "", 1).isdigit() and float(capability) >= 8
    return "cudnn" if is_ampere else "blockwise"
  return "splash" if platform == "tpu" else "blockwise"


def _visible(query_order, num_keys, query_segments, key_segments):
  """Mask [..., T, S] of what each query sees, or None when it sees all.

  Order and segments of queries are [..., T], or None; segments of keys are [..., S].
  """
  visible = None
  if query_order is not None:
    visible = query_order[..., :, None] >= jnp.arange(num_keys)
  if query_segments is not None:
    same = query_segments[..., :, None] == key_segments[..., None, :]
    visible = same if visible is None else visible & same
  return visible


def _attend(q, k, v, visible):
  """Attention of grouped queries [..., T, G, H] to keys [..., S, H]; mask [..., T, S]."""
  shape = (*_, length, group, head_size) = q.shape
  # Queries and group share an axis: with two, XLA on the CPU would transpose all keys first.
  q = q.reshape(*shape[:-3], length * group, head_size) * jnp.asarray(head_size**-0.5, q.dtype)
  scores = jnp.einsum("...qh,...sh->...qs", q, k, preferred_element_type=jnp.float32)
  if visible is not None:
    visible = jnp.repeat(visible, group, axis=-2)
    scores = jnp.where(visible, scores, _MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1, keepdims=True)
  # Divided after the product: S times fewer divisions, and no second pass over the weights.
  mixed = jnp.einsum(
    "...qs,...sh->...qh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return (mixed / total).astype(q.dtype).reshape(shape)


def _heads_first(q, k, v):
  """Queries [B, K, T, G, H]; keys and values [B, K, S, H]."""
  batch, length, num_heads, head_size = q.shape
  num_kv_heads = k.shape[2]
  q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_size)
  return q.transpose(0, 2, 1, 3, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _dense(q, k, v, causal, query_order, query_segments, key_segments):
  shape = q.shape
  if causal and query_order is None:
    query_order = jnp.arange(shape[1])[None]
  visible = _visible(query_order if causal else None, k.shape[1], query_segments, key_segments)
  q, k, v = _heads_first(q, k, v)
  out = _attend(q, k, v, None if visible is None else visible[:, None])
  return out.transpose(0, 2, 1, 3, 4).reshape(shape)


def _blockwise(q, k, v, causal, query_order, query_segments, key_segments):
  batch, length, num_heads, _ = q.shape
  num_keys, num_kv_heads = k.shape[1], k.shape[2]
  rows_at_once = max(_BLOCK_QUERIES, _BLOCK_SCORES // (num_keys * (num_heads // num_kv_heads)))
  block = -(-length // -(-length // rows_at_once))  # equal blocks, lest the last one be padding
  in_order = causal and query_order is None
  if in_order:
    query_order = jnp.arange(length)[None]
  if causal:
    query_order = jnp.broadcast_to(query_order, (batch, length))
  about_queries = (query_order if causal else None, query_segments)
  q, k, v = _heads_first(q, k, v)

  # Queries in array order never look beyond themselves, so a stretch of them needs only the
  # keys up to its end. Eight stretches save 7/16 of the products.
  stretch = -(-length // (8 * block)) * block if in_order else length
  out = []
  for start in range(0, length, stretch):
    rows = slice(start, min(start + stretch, length))
    keys = slice(0, min(rows.stop, num_keys) if in_order else num_keys)
    out.append(
      _map_blocks(
        q[:, :, rows],
        k[:, :, keys],
        v[:, :, keys],
        jax.tree.map(lambda of_queries, rows=rows: of_queries[:, rows], about_queries),
        None if key_segments is None else key_segments[:, keys],
        block,
      )
    )
  out = jnp.concatenate(out, axis=2)
  return out.transpose(0, 2, 1, 3, 4).reshape(batch, length, num_heads, -1)


def _map_blocks(q, k, v, about_queries, key_segments, block):
  """Attention of q [B, K, T, G, H], one key/value head and `block` queries at a time.

  `about_queries` holds order and segments, [B, T] each, or None. Masks are made for one block at a
  time; whole, they would take more memory than a long video's keys.
  """
  batch, num_kv_heads, length, group, head_size = q.shape
  padding = -length % block
  q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
  q = q.reshape(batch * num_kv_heads, -1, block, group, head_size)
  k = k.reshape(batch * num_kv_heads, *k.shape[2:])
  v = v.reshape(batch * num_kv_heads, *v.shape[2:])
  about_queries = jax.tree.map(
    lambda x: jnp.pad(x, ((0, 0), (0, padding))).reshape(batch, -1, block), about_queries
  )

  def one_head(operands):
    q_blocks, k_head, v_head, row = operands

    def one_block(operands):
      q_block, (order, segments) = operands
      segments_of_keys = None if key_segments is None else key_segments[row]
      visible = _visible(order, len(k_head), segments, segments_of_keys)
      return _attend(q_block, k_head, v_head, visible)

    about_blocks = jax.tree.map(lambda x: x[row], about_queries)
    # Recomputed in the backward pass, else every block's weights would be kept.
    return jax.lax.map(jax.checkpoint(one_block), (q_blocks, about_blocks))

  rows = jnp.arange(batch * num_kv_heads) // num_kv_heads
  out = jax.lax.map(one_head, (q, k, v, rows))
  return out.reshape(batch, num_kv_heads, -1, group, head_size)[:, :, :length]


def _cudnn(q, k, v, causal, query_order, query_segments, key_segments):
  in_order = query_order is None and q.shape[1] == k.shape[1]
  fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
  if query_segments is not None or (causal and not in_order) or not fits:
    return _blockwise(q, k, v, causal, query_order, query_segments, key_segments)
  return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


_IMPLEMENTATIONS = {
  "dense": _dense,
  "blockwise": _blockwise,
  "cudnn": _cudnn,
  "splash": splash.attention,
}
