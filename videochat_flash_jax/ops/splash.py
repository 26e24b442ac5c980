"""Splash, the attention kernel for TPUs that comes with jax, with the contract of this package.

The kernel takes arrays with heads first, lengths that are multiples of its blocks, and tables of
the blocks of keys that each block of queries sees. jax builds these tables on the host from a mask,
which takes minutes for 100 thousand tokens. Here the device computes them from the order of the
queries, which takes no noticeable time. So queries may stand anywhere among the keys: behind a
cache, or on a shard of a sequence.

  order of 4 queries, 2 a block: 2 3 | 4 5; keys 0 to 7, 2 a block

                keys 0-1   2-3    4-5    6-7
  queries 2-3    seen      seen   -      -
  queries 4-5    seen      seen   seen   -

The kernel's backward pass takes the result and the log-sum-exp over *all* keys, so it can also
compute the gradients for a part of the keys (see `ops/blockwise.py`). It is a private function of
jax, and only this module uses it; it is the same in jax 0.10.2 to 0.12.0.
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
from videochat_flash_jax.ops.blockwise import NOTHING, Partial, order_among_keys
from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK = 1024  # queries, and keys, in a block at most; fits every chip, speed is not measured
_LANES = 128  # a block is a multiple of this
_TABLE_ENTRIES = 1 << 18  # three bytes each; a TPU core has 1 MiB of memory for them
MOST_TOKENS = math.isqrt(_TABLE_ENTRIES) * _BLOCK  # that can attend to each other in order
_PADDED_QUERY, _PADDED_KEY = -(1 << 31), -(1 << 31) + 1  # segments of padding, used by no token
_INTERPRET = False  # tests run the kernel on the CPU


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  causal: bool,
  query_order: Int[Array, "#B T"] | None,
  query_segments: Int[Array, "B T"] | None,
  key_segments: Int[Array, "B S"] | None,
) -> Partial:
  """Does what `blockwise.attend` does; the kernel rounds `out` to the dtype of `q`."""
  order = order_among_keys(q, causal, query_order)
  length = q.shape[1]
  operands = _kernel_operands(q, k, v, order, query_segments, key_segments)

  def one_row(order, q, k, v, segments):
    """Result [N, T, H] and log-sum-exp [N, T] of one row."""
    out, (lse,) = _kernel(q, k, order)(q, k, v, segments)
    return out, lse

  out, lse = _map_rows(one_row, order, *operands)
  # Without a key to see, the kernel gives a mean of values, or 0 / 0 where it skips all blocks.
  seen = lse > NOTHING
  out, lse = jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, NOTHING)
  out, lse = out.swapaxes(1, 2)[:, :length], lse.swapaxes(1, 2)[:, :length]
  return Partial(out.astype(jnp.float32), lse)


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
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Does what `blockwise.attend_backward` does; the kernel rounds to the dtypes of q, k and v."""
  order = order_among_keys(q, causal, query_order)
  operands = _kernel_operands(q, k, v, order, query_segments, key_segments)
  size = operands[0].shape[2]
  out, gradient = (_heads_first(x, size) for x in (merged.out, gradient.astype(v.dtype)))
  lse = _heads_first(merged.lse[..., None], size)[..., 0]

  def one_row(order, q, k, v, segments, out, lse, gradient):
    """Gradients [N, T, H], [K, S, H], [K, S, H] of one row."""
    kernel = _kernel(q, k, order)
    tables = kernel.dq_mask_info, kernel.dkv_mask_info
    residuals = (q, k, v, segments, None, out, lse, *tables)
    return _splash_attention_bwd(**kernel.kwargs, res=residuals, do=gradient)[3:6]

  gradients = _map_rows(one_row, order, *operands, out, lse, gradient)
  d_q, d_k, d_v = (
    d.swapaxes(1, 2)[:, : x.shape[1]].astype(jnp.float32)
    for d, x in zip(gradients, (q, k, v), strict=True)
  )
  return d_q, d_k, d_v


def _map_rows(one_row, order, *operands):
  """Maps over the batch; an order that all rows share is not repeated, nor are its tables."""
  order_axis = 0
  if order is not None and order.shape[0] == 1:
    order, order_axis = order[0], None
  # The compiler rejects a higher precision for products of 16-bit numbers, which need none.
  in_16_bits = operands[0].dtype == jnp.bfloat16
  precision = "default" if in_16_bits else jax.config.jax_default_matmul_precision
  with jax.default_matmul_precision(precision):
    return jax.vmap(one_row, (order_axis, *[0] * len(operands)))(order, *operands)


def _kernel_operands(q, k, v, order, query_segments, key_segments):
  """Queries, keys and values [B, heads, length, H], padded to whole blocks, and segments."""
  (batch, length), num_keys = q.shape[:2], k.shape[1]
  padded_length, padded_keys = (_num_blocks(x) * _block(x) for x in (length, num_keys))
  if query_segments is None and order is None and padded_keys > num_keys:
    query_segments = jnp.zeros((batch, length), jnp.int32)
    key_segments = jnp.zeros((batch, num_keys), jnp.int32)
  segments = None  # not needed where the order hides padded keys, or where there are none
  if query_segments is not None:
    segments = SegmentIds(
      _padded(query_segments, padded_length, _PADDED_QUERY),
      _padded(key_segments, padded_keys, _PADDED_KEY),
    )
  k, v = (_heads_first(x, padded_keys) for x in (k, v))
  return _heads_first(q, padded_length), k, v, segments


def _heads_first(x, length):
  """[B, T, heads, H] -> [B, heads, length, H], padded with zeros."""
  return _padded(x, length, 0).swapaxes(1, 2)


def _padded(x, length, value):
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=value)


def _num_blocks(length):
  return -(-length // _BLOCK)


def _block(length):
  """Tokens in a block. Blocks are equal, because a short last one would be mostly padding."""
  return -(-length // (_num_blocks(length) * _LANES)) * _LANES


def fits(num_queries: int, num_keys: int) -> bool:
  """Whether a TPU core has room for the tables of so many queries and keys with an order."""
  return _num_blocks(num_queries) * _num_blocks(num_keys) <= _TABLE_ENTRIES


def _kernel(q, k, order):
  """The kernel for queries [N, T, H] and keys [K, S, H] of one row, padded to whole blocks."""
  length, num_keys = q.shape[1], k.shape[1]
  block, block_keys = _block(length), _block(num_keys)
  if order is not None and not fits(length, num_keys):
    raise InputError(
      f"{length} tokens that attend to {num_keys} are too many for one TPU core; "
      "shard them over more devices with mesh.sequence"
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
  """Tables for the three kernels: result, gradients of queries, gradients of keys and values."""
  if order is None:
    return (MaskInfo(None, None, None, None, None),) * 3
  order = jnp.pad(order, (0, length - len(order))).astype(jnp.int32)
  last_order = order.reshape(-1, block).max(axis=1)[:, None]
  first_key = jnp.arange(0, num_keys, block_keys)
  seen = last_order >= first_key
  # While a block is skipped, the kernel fetches the next block that it needs: the first block of
  # keys, for the next queries; and the first block of queries that sees these keys.
  keys = jnp.where(seen, jnp.arange(len(first_key)), 0)
  queries = jnp.where(seen, jnp.arange(len(last_order))[:, None], jnp.argmax(seen, axis=0))

  def table(fetched):
    """One table; `fetched` is the index of the block to fetch in each step."""
    return MaskInfo(fetched[None].astype(jnp.int16), None, seen[None].astype(jnp.int8), None, order)

  return table(keys), table(keys), table(queries)
