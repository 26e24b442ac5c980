"""Causal attention over a sequence that is spread over the devices of a ring.

Every device keeps its queries; keys and values travel round the ring, one hop at a time, while the
block that has arrived is computed (Liu et al. 2023). What each block gives is merged in float32 by
log-sum-exp. A block is of one of three kinds, so that no mask of the whole length is ever built:

  diagonal   the device's own keys: causal attention, as on one device
  full       keys from before all of its queries
  skipped    keys from after them

In zigzag order (`parallel/zigzag.py`) a device holds an early and a late chunk. Of another device's
keys its queries then need either the early chunk (all queries) or both (the late queries): each
hop is half a block, on every device, and nobody waits.

                    own keys    of a lower device   of a higher device
  early chunk       diagonal    early: full         skipped
  late chunk        diagonal    early: full         early, late: full

A block is computed by `ops/splash.py` on TPUs and elsewhere, on GPUs too, by
`ops/partial_attention.py`, which is `blockwise` with what a merge needs: the log-sum-exp, and a
gradient that starts from the merged one. JAX's call of cuDNN rounds the former to the dtype of the
result, and has no way to start the latter.
"""

import functools

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops import partial_attention, splash
from videochat_flash_jax.ops.partial_attention import Partial, merge
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
    zigzag: the sequence is in zigzag order, not in its own.
  """
  return _ring_forward(q, k, v, segment_ids, axis_name, zigzag)[0]


def _ring_forward(q, k, v, segment_ids, axis_name, zigzag):
  below, above = _meetings(q.shape[1], zigzag)
  arriving = _pass_on((k, v, segment_ids), axis_name)  # under way while we compute
  attend = _inner_block().attend
  merged = attend(q, k, v, segment_ids, segment_ids, diagonal=True)

  def compute(merged, arrived, is_below):
    k, v, key_segments = arrived

    def meet(queries, keys):
      part = attend(
        q[:, queries],
        k[:, keys],
        v[:, keys],
        segment_ids[:, queries],
        key_segments[:, keys],
        diagonal=False,
      )
      both = merge(Partial(*(x[:, queries] for x in merged)), part)
      return Partial(*(x.at[:, queries].set(y) for x, y in zip(merged, both, strict=True)))

    return jax.lax.cond(is_below, lambda: meet(*below), lambda: meet(*above) if above else merged)

  def hop(carry, index):
    merged, arrived = carry
    arriving = _pass_on(arrived, axis_name)
    return (compute(merged, arrived, _is_below(index, axis_name)), arriving), None

  last = jax.lax.axis_size(axis_name) - 1
  if last > 0:
    (merged, arrived), _ = jax.lax.scan(hop, (merged, arriving), jnp.arange(1, last))
    merged = compute(merged, arrived, _is_below(last, axis_name))
  return merged.out.astype(q.dtype), (q, k, v, segment_ids, merged)


def _ring_backward(axis_name, zigzag, residuals, gradient):
  """Gradients of keys and values travel with them and are home after a whole round."""
  q, k, v, segment_ids, merged = residuals
  below, above = _meetings(q.shape[1], zigzag)
  arriving = _pass_on((k, v, segment_ids), axis_name)
  attend_backward = _inner_block().attend_backward
  d_q, *d_kv = attend_backward(q, k, v, segment_ids, segment_ids, merged, gradient, diagonal=True)

  def compute(d_q, arrived, is_below):
    k, v, key_segments = arrived
    nothing = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]

    def meet(queries, keys):
      part_q, *part_kv = attend_backward(
        q[:, queries],
        k[:, keys],
        v[:, keys],
        segment_ids[:, queries],
        key_segments[:, keys],
        Partial(*(x[:, queries] for x in merged)),
        gradient[:, queries],
        diagonal=False,
      )
      part_kv = [x.at[:, keys].set(y) for x, y in zip(nothing, part_kv, strict=True)]
      return d_q.at[:, queries].add(part_q), part_kv

    skip = (d_q, nothing)
    return jax.lax.cond(is_below, lambda: meet(*below), lambda: meet(*above) if above else skip)

  def hop(carry, index):
    d_q, d_kv, arrived = carry
    arriving, d_kv = _pass_on((arrived, d_kv), axis_name)
    d_q, part_kv = compute(d_q, arrived, _is_below(index, axis_name))
    # Added outside, so that the block need not wait for the sums to arrive.
    return (d_q, jax.tree.map(jnp.add, d_kv, part_kv), arriving), None

  last = jax.lax.axis_size(axis_name) - 1
  if last > 0:
    (d_q, d_kv, arrived), _ = jax.lax.scan(hop, (d_q, d_kv, arriving), jnp.arange(1, last))
    d_kv = _pass_on(d_kv, axis_name)
    d_q, part_kv = compute(d_q, arrived, _is_below(last, axis_name))
    d_kv = jax.tree.map(jnp.add, d_kv, part_kv)
    d_kv = _pass_on(d_kv, axis_name)  # home
  d_k, d_v = d_kv
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _inner_block():
  """The module whose `attend` and `attend_backward` compute a block."""
  return splash if target_platform() == "tpu" else partial_attention


def _meetings(length, zigzag):
  """Which queries meet which keys of a lower device, and of a higher one (None: skipped)."""
  everything, early, late = slice(None), slice(length // 2), slice(length // 2, None)
  return ((everything, early), (late, everything)) if zigzag else ((everything, everything), None)


def _is_below(hops, axis_name):
  """Whether keys that have made so many hops come from a lower device."""
  return hops <= jax.lax.axis_index(axis_name)


def _pass_on(arrays, axis_name):
  """Hands arrays to the next device of the ring, and gets those of the one before."""
  size = jax.lax.axis_size(axis_name)
  hop = [(device, (device + 1) % size) for device in range(size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, hop), arrays)
