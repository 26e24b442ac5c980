"""Splash, the attention kernel for TPUs that comes with jax, behind the contracts of this package.

The kernel takes heads first, lengths that are multiples of its blocks, and tables that say which
blocks of keys a block of queries sees. jax builds the tables from a mask on the host, which takes
minutes at 100 thousand tokens; here they follow from the order of the queries, on the device, in
no time. So queries may stand anywhere among the keys: behind a cache, or on a shard of a sequence.

  order of 4 queries, 2 a block: 2 3 | 4 5; keys 0 to 7, 2 a block

                keys 0-1   2-3    4-5    6-7
  queries 2-3    seen      seen   -      -
  queries 4-5    seen      seen   seen   -

The kernel's own backward pass is fed with the result and the log-sum-exp over *all* keys, so it
also gives the gradients of a part of the keys (see `ops/partial_attention.py`). It is a private
function of jax, and this is the only module that knows it; jax 0.10.2 to 0.12.0 have it alike.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
  DEFAULT_MASK_VALUE,
  BlockSizes,
  SegmentIds,
  SplashAttentionKernel,
  _splash_attention_bwd,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.ops.partial_attention import NOTHING, Partial
from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK = 1024  # queries, and keys, of a block at most; fits every chip, speed is not measured
_LANES = 128  # a block is a multiple of it
_TABLE_ENTRIES = 1 << 18  # three bytes each; a TPU core has 1 MiB of memory for them
MOST_TOKENS = math.isqrt(_TABLE_ENTRIES) * _BLOCK  # that attend to each other in order
_PADDED_QUERY, _PADDED_KEY = -(1 << 31), -(1 << 31) + 1  # segments that nobody else has
_INTERPRET = False  # tests run the kernel on the CPU


def attention(q, k, v, causal, query_order, query_segments, key_segments):
  """See `ops.attention.attention`; every case of it."""
  if not causal:
    query_order = None
  elif query_order is None:
    query_order = jnp.arange(q.shape[1])[None]
  return _attention(q, k, v, query_order, query_segments, key_segments)


@jax.custom_vjp
def _attention(q, k, v, query_order, query_segments, key_segments):
  return _attention_forward(q, k, v, query_order, query_segments, key_segments)[0]


def _attention_forward(*operands):
  out, lse = _forward(*operands)
  return out, (operands, out, lse)


def _attention_backward(residuals, gradient):
  operands, out, lse = residuals
  gradients = _backward(*operands, out, lse, gradient)
  in_dtype = (d.astype(x.dtype) for d, x in zip(gradients, operands, strict=False))
  return *in_dtype, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  *,
  diagonal: bool,
) -> Partial:
  """See `partial_attention.attend`; the kernel rounds `out` to the dtype of `q`."""
  order = jnp.arange(q.shape[1])[None] if diagonal else None
  out, lse = _forward(q, k, v, order, query_segments, key_segments)
  return Partial(out.astype(jnp.float32), lse)


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
  """See `partial_attention.attend_backward`; the kernel rounds to the dtypes of q, k and v."""
  order = jnp.arange(q.shape[1])[None] if diagonal else None
  return _backward(q, k, v, order, query_segments, key_segments, *merged, gradient)


def _forward(q, k, v, order, query_segments, key_segments):
  """What the queries see [B, T, N, H], and its log-sum-exp [B, T, N].

  Args:
    q: queries [B, T, N, H].
    k: keys [B, S, K, H].
    v: values, like the keys.
    order: index of each query among the keys, [B, T] or [1, T]; None: they see all keys.
    query_segments: [B, T] or None.
    key_segments: [B, S] or None.
  """
  length = q.shape[1]
  operands = _kernel_operands(q, k, v, order, query_segments, key_segments)

  def one_row(order, q, k, v, segments):
    out, (lse,) = _kernel(q, k, order)(q, k, v, segments)
    return out, lse

  out, lse = _map_rows(one_row, order, *operands)
  seen = lse > NOTHING  # else the kernel gives a mean of values, or 0 / 0 where no block is seen
  out, lse = jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, NOTHING)
  return out.swapaxes(1, 2)[:, :length], lse.swapaxes(1, 2)[:, :length]


def _backward(q, k, v, order, query_segments, key_segments, out, lse, gradient):
  """Gradients of q, k and v in float32, from the result over all keys; see `_forward`."""
  operands = _kernel_operands(q, k, v, order, query_segments, key_segments)
  size = operands[0].shape[2]
  out, gradient = (_heads_first(x, size) for x in (out, gradient.astype(v.dtype)))
  lse = _heads_first(lse[..., None], size)[..., 0]

  def one_row(order, q, k, v, segments, out, lse, gradient):
    kernel = _kernel(q, k, order)
    tables = kernel.dq_mask_info, kernel.dkv_mask_info
    residuals = (q, k, v, segments, None, out, lse, *tables)
    return _splash_attention_bwd(**kernel.kwargs, res=residuals, do=gradient)[3:6]

  gradients = _map_rows(one_row, order, *operands, out, lse, gradient)
  d_q, d_k, d_v = (
    d.swapaxes(1, 2)[:, : x.shape[1]].astype(jnp.float32)
    for d, x in zip(gradients, (q, k, v), strict=True)
  )
  return d_q * _scale(q), d_k, d_v


def _map_rows(one_row, order, *operands):
  """Maps over the batch; an order that all rows share stays one, and so do its tables."""
  order_axis = 0
  if order is not None and order.shape[0] == 1:
    order, order_axis = order[0], None
  # The compiler refuses to multiply 16-bit numbers at a higher precision; they would not gain.
  in_16_bits = operands[0].dtype == jnp.bfloat16
  precision = "default" if in_16_bits else jax.config.jax_default_matmul_precision
  with jax.default_matmul_precision(precision):
    return jax.vmap(one_row, (order_axis, *[0] * len(operands)))(order, *operands)


def _kernel_operands(q, k, v, order, query_segments, key_segments):
  """Scaled queries, keys and values [B, heads, length, H], padded to whole blocks; segments."""
  (batch, length), num_keys = q.shape[:2], k.shape[1]
  padded_length, padded_keys = (_num_blocks(x) * _block(x) for x in (length, num_keys))
  if query_segments is None and order is None and padded_keys > num_keys:
    query_segments = jnp.zeros((batch, length), jnp.int32)
    key_segments = jnp.zeros((batch, num_keys), jnp.int32)
  segments = None  # then no query comes after the padded keys, and none sees them
  if query_segments is not None:
    segments = SegmentIds(
      _padded(query_segments, padded_length, _PADDED_QUERY),
      _padded(key_segments, padded_keys, _PADDED_KEY),
    )
  q = _heads_first(q * jnp.asarray(_scale(q), q.dtype), padded_length)
  return q, _heads_first(k, padded_keys), _heads_first(v, padded_keys), segments


def _scale(q):
  return q.shape[-1] ** -0.5


def _heads_first(x, length):
  return _padded(x, length, 0).swapaxes(1, 2)


def _padded(x, length, value):
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=value)


def _num_blocks(length):
  return -(-length // _BLOCK)


def _block(length):
  """Equal blocks, lest the last one be padding."""
  return -(-length // (_num_blocks(length) * _LANES)) * _LANES


def fits(num_queries: int, num_keys: int) -> bool:
  """Whether a TPU core has room for the tables of so many queries that see keys in order."""
  return _num_blocks(num_queries) * _num_blocks(num_keys) <= _TABLE_ENTRIES


def _kernel(q, k, order):
  """The kernel for queries [N, T, H] and keys [K, S, H] of one row, padded to whole blocks."""
  length, num_keys = q.shape[1], k.shape[1]
  block, block_keys = _block(length), _block(num_keys)
  if order is not None and not fits(length, num_keys):
    raise InputError(
      f"{length} tokens that attend to {num_keys} are too many for one TPU core; "
      "spread them over more devices with mesh.sequence"
    )
  sizes = BlockSizes(
    block_q=block,
    block_kv=block_keys,
    block_q_dkv=block,
    block_kv_dkv=block_keys,
    block_q_dq=block,
    block_kv_dq=block_keys,
  )
  return SplashAttentionKernel(
    *_tables(order, length, num_keys, block, block_keys),
    block_sizes=sizes,
    is_mqa=False,
    save_residuals=True,
    mask_value=DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=None if order is None else _sees,
    interpret=_INTERPRET,
  )


def _sees(query_order, key_index):
  return query_order >= key_index


def _tables(order, length, num_keys, block, block_keys):
  """Tables for the three kernels: results, gradients of queries, gradients of keys and values."""
  if order is None:
    return (MaskInfo(None, None, None, None, None),) * 3
  order = jnp.pad(order, (0, length - len(order))).astype(jnp.int32)
  last_order = order.reshape(-1, block).max(axis=1)[:, None]
  first_key = jnp.arange(0, num_keys, block_keys)
  seen = last_order >= first_key
  # What to fetch while a block is skipped: what comes next. That is the first block of keys, for
  # the next queries; and the first block of queries that sees these keys.
  keys = jnp.where(seen, jnp.arange(len(first_key)), 0)
  queries = jnp.where(seen, jnp.arange(len(last_order))[:, None], jnp.argmax(seen, axis=0))

  def table(fetched):
    return MaskInfo(fetched[None].astype(jnp.int16), None, seen[None].astype(jnp.int8), None, order)

  return table(keys), table(keys), table(queries)
