"""Causal self-attention of a sequence that may be sharded over a mesh."""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.ring_attention import ring_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.zigzag import unzigzag_order, zigzag_order
from videochat_flash_jax.shapes import Array, Float, Int


def self_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"] | None,
  layout: Layout,
) -> Float[Array, "B T N H"]:
  """Attends as `attention(..., causal=True)` does, on any mesh.

  Rows are split over `data` and `fsdp`, tokens over `sequence`, heads over `tensor`.

  Args:
    q: queries.
    k: keys of the same tokens.
    v: values of the same tokens.
    segment_ids: tokens see only their own segment; None for one segment.
    layout: how the arrays are sharded, and whether keys are gathered or sent round a ring.

  Raises:
    InputError: the tokens cannot be split into equal parts.
  """
  shards = layout.sequence_shards
  parts = 2 * shards if layout.zigzag else shards
  if q.shape[1] % parts:
    raise InputError(
      f"a sequence of {q.shape[1]} tokens has no {parts} equal parts for {shards} devices"
      f"{', each of which has two' if layout.zigzag else ''}; pad it to "
      f"{-(-q.shape[1] // parts) * parts}"
    )
  if segment_ids is None and shards > 1:  # on one shard None stays None: cuDNN takes no segments
    segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
  if shards == 1:
    local = _one_shard
  elif layout.sequence_parallel == "ring":
    local = functools.partial(_ring, zigzag=layout.zigzag)
  else:
    local = functools.partial(_gathered, shards=shards, zigzag=layout.zigzag)
  heads, tokens = ("batch", "sequence", "heads"), ("batch", "sequence")
  return layout.shard_map(local, (heads, heads, heads, tokens), heads)(q, k, v, segment_ids)


def _one_shard(q, k, v, segment_ids):
  """Attends on a device that holds whole rows."""
  return attention(q, k, v, causal=True, query_segments=segment_ids, key_segments=segment_ids)


def _ring(q, k, v, segment_ids, zigzag):
  """Attends while keys and values are sent round the ring."""
  return ring_attention(q, k, v, segment_ids, "sequence", zigzag)


def _gathered(q, k, v, segment_ids, shards, zigzag):
  """Attends to the keys and values of whole rows, which are gathered from all devices."""

  def gather(x):
    """The tokens of all devices of a row."""
    return jax.lax.all_gather(x, "sequence", axis=1, tiled=True)

  k, v, key_segments = gather(k), gather(v), gather(segment_ids)
  num_keys, length = k.shape[1], q.shape[1]
  order = jnp.arange(num_keys)
  if zigzag:
    text_order = unzigzag_order(num_keys, shards)
    k, v, key_segments = (x[:, text_order] for x in (k, v, key_segments))
    order = jnp.asarray(zigzag_order(num_keys, shards))
  start = jax.lax.axis_index("sequence") * length
  order = jax.lax.dynamic_slice_in_dim(order, start, length)
  return attention(
    q,
    k,
    v,
    causal=True,
    query_order=order[None],
    query_segments=segment_ids,
    key_segments=key_segments,
  )
