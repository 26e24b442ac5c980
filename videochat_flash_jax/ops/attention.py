"""Softmax attention: one contract, four implementations.

| name        | where                       | scores in memory | cases             |
|-------------|-----------------------------|------------------|-------------------|
| `dense`     | anywhere; the reference     | T x S            | all               |
| `blockwise` | anywhere; made for CPUs     | a tile           | all               |
| `cudnn`     | NVIDIA GPUs, from Ampere on | none             | 16 bits, no       |
|             |                                   |                  | segments or order |
| `splash`    | TPUs                        | none             | all               |

`cudnn` leaves all other cases to `blockwise`. `ops/blockwise.py` and `ops/splash.py` have the same
two functions: `attend` gives the result and its log-sum-exp, and `attend_backward` the gradients.
`ops/ring_attention.py` calls them for a part of the keys at a time.

On more than one TPU `splash` has to be called inside `jax.shard_map`: the compiler cannot split a
kernel.
"""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops import blockwise, splash
from videochat_flash_jax.ops.blockwise import NOTHING, Partial, order_among_keys
from videochat_flash_jax.ops.platform import target_platform
from videochat_flash_jax.shapes import Array, Float, Int

_DENSE_SCORES = 256 * 256  # up to this many scores per head, one dense product is faster
_CACHED_SCORES = 1 << 22  # of all heads; fewer stay in a CPU's last cache: dense is faster


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
  """Attends with softmax(q k) v; query head n reads key/value head n // (N / K).

  Args:
    q: queries, scaled already: see `scaled`.
    k: keys, with K dividing N (grouped-query attention).
    v: values.
    causal: a query sees only the keys whose index is at most its order.
    query_order: index of each query among the keys, if it is not the query's own index (for
      example in a chunk that continues a cache). Only used if `causal`.
    query_segments: with `key_segments`, a query sees only keys of its own segment (packing).
    key_segments: see `query_segments`.
    implementation: "dense", "blockwise", "cudnn", "splash", or None to choose by the size and the
      device that the program is traced for.

  Returns:
    One vector per query and head, in the dtype of `q`. Scores and softmax are float32.
  """
  if implementation is None:
    small = q.shape[1] == 1 or q.shape[1] * k.shape[1] <= _DENSE_SCORES
    implementation = "dense" if small else _fastest()
  run = _IMPLEMENTATIONS[implementation]
  return run(q, k, v, causal, query_order, query_segments, key_segments)


def partial_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  query_order: Int[Array, "#B #T"],
) -> Partial:
  """As `attention(..., causal=True)` for a part of the keys, to be merged with that of other parts.

  Args:
    q: queries, scaled already.
    k: keys of the part.
    v: values of the part.
    query_order: a query sees only the keys whose index is at most its order; with -1, none.

  Returns:
    Result and log-sum-exp in float32; zeros and `NOTHING` for a query that sees no key.
  """
  query_order = jnp.broadcast_to(query_order, (len(query_order), q.shape[1]))
  module, num_scores = splash if target_platform() == "tpu" else blockwise, q.shape[1] * k.shape[1]
  is_cached = module is blockwise and num_scores * q.shape[0] * q.shape[2] < _CACHED_SCORES
  if q.shape[1] == 1 or num_scores <= _DENSE_SCORES or is_cached:
    return _dense_partial(q, k, v, True, query_order, None, None)
  return module.attend(q, k, v, True, query_order, None, None)


def scaled(q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
  """Queries divided by sqrt(H). `apply_rope` scales those of the decoder as it rounds them."""
  return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _fastest():
  """Name of the implementation for the device that the program is traced for."""
  platform = target_platform()
  if platform == "gpu":
    capability = jax.devices()[0].compute_capability  # "8.0" for Ampere; no number on AMD's GPUs
    is_ampere = capability.replace(".", "", 1).isdigit() and float(capability) >= 8
    return "cudnn" if is_ampere else "blockwise"
  return "splash" if platform == "tpu" else "blockwise"


def _dense(q, k, v, causal, query_order, query_segments, key_segments):
  """Computes all scores at once; JAX derives the gradient."""
  return _dense_partial(q, k, v, causal, query_order, query_segments, key_segments).out.astype(
    q.dtype
  )


def _dense_partial(q, k, v, causal, query_order, query_segments, key_segments) -> Partial:
  """The same, with the log-sum-exp."""
  (batch, length, num_heads, head_size), num_kv_heads = q.shape, k.shape[2]
  group = num_heads // num_kv_heads
  visible = _visible(q, k, causal, query_order, query_segments, key_segments)
  # Queries and group share an axis: with two, XLA on the CPU would transpose all keys first.
  rows = q.reshape(batch, length, num_kv_heads, group, head_size).swapaxes(1, 2)
  rows = rows.reshape(batch, num_kv_heads, length * group, head_size)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  scores = jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32)
  if visible is not None:
    scores = jnp.where(jnp.repeat(visible, group, axis=1)[:, None], scores, NOTHING)
  highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - highest)
  total = weights.sum(axis=-1, keepdims=True)
  # Divided after the product: S times fewer divisions, and no second pass over the weights.
  mixed = jnp.einsum(
    "bkqs,bksh->bkqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  seen = highest > NOTHING  # else a mean of all values
  out, lse = jnp.where(seen, mixed / total, 0), jnp.where(seen, highest + jnp.log(total), NOTHING)
  out, lse = (
    x.reshape(batch, num_kv_heads, length, group, -1).swapaxes(1, 2).reshape(*q.shape[:3], -1)
    for x in (out, lse)
  )
  return Partial(out, lse[..., 0])


def _visible(q, k, causal, query_order, query_segments, key_segments):
  """Mask [#B, T, S] of the keys that each query sees, or None if it sees all."""
  visible = None
  order = order_among_keys(q, causal, query_order)
  if order is not None:
    visible = order[:, :, None] >= jnp.arange(k.shape[1])
  if query_segments is not None:
    same = query_segments[:, :, None] == key_segments[:, None, :]
    visible = same if visible is None else visible & same
  return visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _flash(module, q, k, v, causal, query_order, query_segments, key_segments):
  """Attends with the `attend` of a module; the gradient is computed by its `attend_backward`."""
  mask = query_order, query_segments, key_segments
  return _flash_forward(module, q, k, v, causal, *mask)[0]


def _flash_forward(module, q, k, v, causal, *mask):
  out, lse = module.attend(q, k, v, causal, *mask)
  out = out.astype(q.dtype)
  return out, (q, k, v, mask, Partial(out, lse))


def _flash_backward(module, causal, residuals, gradient):
  q, k, v, mask, merged = residuals
  gradients = module.attend_backward(q, k, v, causal, *mask, merged, gradient)
  in_dtype = (d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True))
  return *in_dtype, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)
_blockwise = functools.partial(_flash, blockwise)
_splash = functools.partial(_flash, splash)


def _cudnn(q, k, v, causal, query_order, query_segments, key_segments):
  """Calls cuDNN where it has the case, and `blockwise` elsewhere."""
  in_order = query_order is None and q.shape[1] == k.shape[1]
  fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
  if query_segments is not None or (causal and not in_order) or not fits:
    return _blockwise(q, k, v, causal, query_order, query_segments, key_segments)
  return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=causal, implementation="cudnn")


_IMPLEMENTATIONS = {
  "dense": _dense,
  "blockwise": _blockwise,
  "cudnn": _cudnn,
  "splash": _splash,
}
