"""Causal attention over a sequence that is sharded over the devices of a ring.

Every device keeps its queries. Blocks of keys and values are sent round the ring, one device
further in each step. While a device computes with one block, the next block is on its way (Liu et
al. 2023). The results for all blocks are merged in float32 by their log-sum-exp. There are three
kinds of blocks, so that no mask of the whole length is ever built:

  diagonal   the device's own keys: causal attention, as on one device
  full       keys that stand before all of its queries
  skipped    keys that stand after all of its queries

In zigzag order (`parallel/zigzag.py`) a device holds an early and a late chunk. From the keys of
another device, its queries need either the early chunk (for all queries) or both chunks (for the
late queries). So each step computes half a block on every device, and no device waits.

                    own keys    of a lower device   of a higher device
  early chunk       diagonal    early: full         skipped
  late chunk        diagonal    early: full         early, late: full

A block is computed by `ops/splash.py` on TPUs, and by `ops/blockwise.py` on CPUs and GPUs. cuDNN
cannot be used: as JAX calls it, the log-sum-exp is rounded to the dtype of the result, and the
backward pass cannot start from a merged result.
"""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops import blockwise, splash
from videochat_flash_jax.ops.blockwise import Partial, merge
from videochat_flash_jax.ops.platform import target_platform
from videochat_flash_jax.shapes import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"],
  axis_name: str,
  zigzag: bool,
) -> Float[Array, "B T N H"]:
  """Attends as `ops.attention` does with `causal=True`; to be called inside `jax.shard_map`.

  Args:
    q: this device's queries; T is the length of its shard.
    k: keys of the same tokens.
    v: values of the same tokens.
    segment_ids: tokens see only their own segment. Padding has a segment of its own.
    axis_name: mesh axis along which the sequence is sharded.
    zigzag: whether the sequence is in zigzag order instead of its own order.
  """
  return _ring_forward(q, k, v, segment_ids, axis_name, zigzag)[0]


def _ring_forward(q, k, v, segment_ids, axis_name, zigzag):
  """Returns the result, and what the backward pass needs."""
  from_lower, from_higher = _needed_parts(q.shape[1], zigzag)
  next_block = _send_on((k, v, segment_ids), axis_name)  # is sent while we compute
  attend, _ = _kernels()
  merged = attend(q, k, v, causal=True, query_segments=segment_ids, key_segments=segment_ids)

  def add_block(merged, block, is_lower):
    """Merges the attention to a block into the result so far."""
    k, v, key_segments = block

    def add_part(queries, keys):
      """Merges the attention of some queries to some keys of the block."""
      part = attend(
        q[:, queries],
        k[:, keys],
        v[:, keys],
        causal=False,
        query_segments=segment_ids[:, queries],
        key_segments=key_segments[:, keys],
      )
      both = merge(Partial(*(x[:, queries] for x in merged)), part)
      return Partial(*(x.at[:, queries].set(y) for x, y in zip(merged, both, strict=True)))

    return jax.lax.cond(
      is_lower,
      lambda: add_part(*from_lower),
      lambda: add_part(*from_higher) if from_higher else merged,
    )

  def step(carry, index):
    """Computes with one block while the next block is sent."""
    merged, block = carry
    next_block = _send_on(block, axis_name)
    return (add_block(merged, block, _is_from_lower(index, axis_name)), next_block), None

  last = jax.lax.axis_size(axis_name) - 1
  if last > 0:
    (merged, block), _ = jax.lax.scan(step, (merged, next_block), jnp.arange(1, last))
    merged = add_block(merged, block, _is_from_lower(last, axis_name))
  return merged.out.astype(q.dtype), (q, k, v, segment_ids, merged)


def _ring_backward(axis_name, zigzag, residuals, gradient):
  """Gradients of keys and values are sent with them, and are back after a whole round."""
  q, k, v, segment_ids, merged = residuals
  from_lower, from_higher = _needed_parts(q.shape[1], zigzag)
  next_block = _send_on((k, v, segment_ids), axis_name)
  _, attend_backward = _kernels()
  d_q, *d_kv = attend_backward(
    q,
    k,
    v,
    causal=True,
    query_segments=segment_ids,
    key_segments=segment_ids,
    merged=merged,
    gradient=gradient,
  )

  def add_block(d_q, block, is_lower):
    """Adds a block's gradients of our queries to `d_q`; gives those of its keys and values."""
    k, v, key_segments = block
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]

    def add_part(queries, keys):
      """Does so for some queries and some keys of the block."""
      part_q, *part_kv = attend_backward(
        q[:, queries],
        k[:, keys],
        v[:, keys],
        causal=False,
        query_segments=segment_ids[:, queries],
        key_segments=key_segments[:, keys],
        merged=Partial(*(x[:, queries] for x in merged)),
        gradient=gradient[:, queries],
      )
      part_kv = [x.at[:, keys].set(y) for x, y in zip(zeros, part_kv, strict=True)]
      return d_q.at[:, queries].add(part_q), part_kv

    return jax.lax.cond(
      is_lower,
      lambda: add_part(*from_lower),
      lambda: add_part(*from_higher) if from_higher else (d_q, zeros),
    )

  def step(carry, index):
    """Computes with one block while the next block and the gradients so far are sent."""
    d_q, d_kv, block = carry
    next_block, d_kv = _send_on((block, d_kv), axis_name)
    d_q, block_kv = add_block(d_q, block, _is_from_lower(index, axis_name))
    # Added here and not in `add_block`, which so need not wait until the gradients have arrived.
    return (d_q, jax.tree.map(jnp.add, d_kv, block_kv), next_block), None

  last = jax.lax.axis_size(axis_name) - 1
  if last > 0:
    (d_q, d_kv, block), _ = jax.lax.scan(step, (d_q, d_kv, next_block), jnp.arange(1, last))
    d_kv = _send_on(d_kv, axis_name)
    d_q, block_kv = add_block(d_q, block, _is_from_lower(last, axis_name))
    d_kv = jax.tree.map(jnp.add, d_kv, block_kv)
    d_kv = _send_on(d_kv, axis_name)  # back to the device of the keys
  d_k, d_v = d_kv
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _kernels():
  """The functions that compute a block, forward and backward."""
  if target_platform() == "tpu":
    functions, options = (splash.attend, splash.attend_backward), {}
  else:
    # With a loop over heads inside of the loop over steps, XLA on several CPU devices may start a
    # collective after the ring before the ring has ended on all devices, and wait forever.
    functions = blockwise.attend, blockwise.attend_backward
    options = {"heads_at_once": True}
  return [functools.partial(function, query_order=None, **options) for function in functions]


def _needed_parts(length, zigzag):
  """Which (queries, keys) are computed for keys of a lower device, and of a higher one, if any."""
  everything, early, late = slice(None), slice(length // 2), slice(length // 2, None)
  return ((everything, early), (late, everything)) if zigzag else ((everything, everything), None)


def _is_from_lower(steps, axis_name):
  """Whether a block that was sent so many steps comes from a device with a lower index."""
  return steps <= jax.lax.axis_index(axis_name)


def _send_on(arrays, axis_name):
  """Sends arrays to the next device of the ring, and returns those of the previous device."""
  size = jax.lax.axis_size(axis_name)
  to_next = [(device, (device + 1) % size) for device in range(size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, to_next), arrays)
