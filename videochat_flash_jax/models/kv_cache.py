"""The KV cache: keys and values of the tokens that a part of the decoder's layers has read."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.ops.attention import attention, partial_attention
from videochat_flash_jax.ops.blockwise import NOTHING, Partial, merge
from videochat_flash_jax.ops.kv_formats import Int4, KVFormat, Wide, rotate
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK_SLOTS = 1 << 14  # rounded keys and values are made wide so many at a time


class KVCache(NamedTuple):
  """Keys and values of the tokens read so far: row b uses its first `length[b]` slots.

  On a mesh the slots may be split over several devices. Each device then has the tokens of its part
  of every piece that was read, in its own first slots: with two devices the pieces `a b c d` and
  `e f` are held as `a b e` and `c d f`. The order of keys makes no difference to attention.

  Attributes:
    stored: arrays [L, B, K, S, H], and scales [L, B, K, S] if they are rounded.
    length: number of tokens of each row, on each of the devices over which its slots are split.
  """

  stored: KVFormat
  length: Int[Array, "B shards"]

  @classmethod
  def empty(
    cls,
    config: DecoderConfig,
    batch: int,
    num_slots: int,
    *,
    depth: int,
    dtype=jnp.float32,
    kept_as: type[KVFormat] = Wide,
    shards: int = 1,
  ) -> "KVCache":
    """A cache without tokens.

    Args:
      config: of the decoder.
      batch: number of rows.
      num_slots: tokens that fit into a row.
      depth: number of layers that the cache is for.
      dtype: of keys and values.
      kept_as: how they are kept.
      shards: number of devices over which the slots are split.
    """
    shape = (depth, batch, config.num_kv_heads, num_slots, config.head_size)
    return cls(empty_slots(kept_as, shape, dtype), jnp.zeros((batch, shards), jnp.int32))

  @property
  def depth(self) -> int:
    """Number of layers that the cache is for."""
    return len(self.stored[0])

  @property
  def num_slots(self) -> int:
    """Tokens that fit into a row."""
    return self.stored[0].shape[3]

  @property
  def kept_as(self) -> type[KVFormat]:
    """How keys and values are kept."""
    return type(self.stored)

  def positions(self, num_tokens: int, behind: tuple["KVCache", ...] = ()) -> Int[Array, "B T"]:
    """Rotary positions of the next T tokens of each row; `behind` is as in `attend`."""
    start = self.length.sum(axis=1)
    if behind:
      start = start + jnp.concatenate([cache.length.sum(axis=1) for cache in behind])
    return start[:, None] + jnp.arange(num_tokens)[None]

  def widened(self, num_slots: int) -> "KVCache":
    """The same tokens in a cache of `num_slots` slots per row, at least as many as now.

    This cache is freed, one array after another, so that the device never holds it twice.
    """
    return self._replace(stored=jax.tree.map(lambda x: more_slots(x, 3, num_slots), self.stored))

  @property
  def axes(self) -> "KVCache":
    """The named axes of the arrays, for `Layout`."""
    slots = "slots" if self.length.shape[1] > 1 else "replicated"
    of_stored = self.kept_as(*(("layer", "batch", "heads", slots) for _ in self.kept_as._fields))
    return type(self)(of_stored, ("batch", slots))

  def longer(self, num_tokens: Int[Array, "B"], size: int) -> "KVCache":
    """Counts a piece of `size` tokens, all but `num_tokens` of them padding, as read."""
    return self._replace(
      length=self.length + shares(num_tokens[:, None], size, self.length.shape[1])
    )

  def attend(
    self,
    layer: int | Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    behind: tuple["KVCache", ...] = (),
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B T N H"], "KVCache"]:
    """Writes new tokens into one layer of the cache, then computes their causal attention.

    A new token attends to itself, to the new tokens before it, to all tokens in the cache, and to
    all tokens of the caches that the row stands behind. On a mesh every device does this for its
    own heads and its own slots, so no key or value is sent between devices. Queries are sent, and
    what they found in the slots of each device is merged.

    Args:
      layer: index of the layer, counted from the first one that this cache is for.
      q: queries of the new tokens.
      k: keys of the new tokens.
      v: values of the new tokens.
      behind: caches of one row each, of tokens before those of this cache. One: all rows stand
        behind it. B: each row stands behind its own. None: this cache has all tokens.
      layout: how heads, and the slots of caches, are split over a mesh.

    Returns:
      The output of the attention; and the cache, with the same `length` as before.
    """
    slots = self.axes.length[1]
    is_split = slots == "slots"

    def attend(layer, q, k, v, cache, behind):
      """Does the same for the heads of one device, and for the slots that it has."""
      cache, size = cache._write(layer, k, v), q.shape[1]
      num_seen = jnp.arange(size) + 1  # of the new tokens, by each query
      if is_split:
        q = layout.reduce_over(_gather_tokens, q, "slots")
        num_seen = jnp.arange(q.shape[1]) + 1 - size * layout.axis_index("slots")
      order = cache.length + jnp.clip(num_seen, 0, size)[None] - 1
      if not behind and cache.kept_as is Wide and not is_split:
        return attention(q, *cache.read(layer, q.dtype), causal=True, query_order=order), cache
      part = cache.attend_in_order(layer, q, order)
      if is_split:
        part = _merge_shards(part, layout, _split_tokens)
      if behind:
        part = merge(part, _attend_behind(q, layer, behind, layout))
      return part.out.astype(q.dtype), cache

    heads, of_behind = ("batch", slots, "heads"), tuple(cache.axes for cache in behind)
    local = layout.shard_map(
      attend, ((), heads, heads, heads, self.axes, of_behind), (heads, self.axes)
    )
    return local(layer, q, k, v, self, behind)

  def attend_in_order(
    self, layer: int | Int[Array, ""], q: Float[Array, "B T N H"], order: Int[Array, "#B #T"]
  ) -> Partial:
    """Attention of queries to the slots up to their order, of one layer.

    Rounded keys and values are made wide a block at a time, as far as any query looks.
    """
    if self.kept_as is Wide:
      return partial_attention(q, *self.read(layer, q.dtype), order)
    is_rotated = self.kept_as is Int4
    queries, size = rotate(q) if is_rotated else q, math.gcd(self.num_slots, _BLOCK_SLOTS)

    def add_block(block, merged):
      """Merges the attention to one block."""
      start = block * size
      k, v = self.read(layer, q.dtype, start, size)
      return merge(merged, partial_attention(queries, k, v, order - start))

    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], NOTHING))
    merged = jax.lax.fori_loop(0, order.max() // size + 1, add_block, nothing)
    return merged._replace(out=rotate(merged.out)) if is_rotated else merged

  def write(
    self,
    layer: int | Int[Array, ""],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout = ONE_DEVICE,
  ) -> "KVCache":
    """Writes new tokens into one layer, after its `length` first tokens. `length` stays."""
    heads = ("batch", self.axes.length[1], "heads")
    local = layout.shard_map(type(self)._write, (self.axes, (), heads, heads), self.axes)
    return local(self, layer, k, v)

  def _write(self, layer, k, v):
    """Writes what this device has of the tokens.

    Writing row by row happens in place. One scatter over all rows would copy the cache.
    """
    new = self.kept_as.encode(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def write(slots, new):
      """Writes into one array."""
      for row in range(len(new)):
        at = (layer, row, 0, self.length[row, 0], 0)[: slots.ndim]
        new_row = new[None, row : row + 1].astype(slots.dtype)
        slots = jax.lax.dynamic_update_slice(slots, new_row, at)
      return slots

    return self._replace(stored=jax.tree.map(write, self.stored, new))

  def without(
    self, start: Int[Array, ""], num_tokens: Int[Array, ""], turn: Callable[[Array], Array]
  ) -> "KVCache":
    """Forgets tokens; see `Qwen2.forget`. `turn` turns keys [B, S, K, H] to their new positions."""
    cache = self._replace(length=jnp.zeros_like(self.length))  # for layers to be written anew
    cache = cache._in_each_layer(
      lambda layer, cache: cache._without(layer, start, num_tokens, turn)
    )
    return cache._replace(length=self.length - num_tokens)

  def _in_each_layer(self, change):
    """This cache after `cache = change(layer, cache)` for every layer."""
    return jax.lax.fori_loop(0, self.depth, change, self)

  def _without(self, layer, start, num_tokens, turn):
    """Moves the tokens of one layer up."""
    k, v = self.read(layer, jnp.float32)
    if self.kept_as is Int4:
      k, v = rotate(k), rotate(v)
    moves = (jnp.arange(self.num_slots) >= start)[:, None, None]
    k = jnp.where(moves, turn(jnp.roll(k, -num_tokens, axis=1)), k)
    return self._write(layer, k, jnp.where(moves, jnp.roll(v, -num_tokens, axis=1), v))

  def read(
    self,
    layer: int | Int[Array, ""],
    dtype,
    start: int | Int[Array, ""] = 0,
    num_slots: int | None = None,
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Keys and values in slots of one layer, in the axis order of `ops.attention`.

    Args:
      layer: index of the layer.
      dtype: of the result.
      start: the first slot.
      num_slots: S; None for all.
    """
    num_slots = num_slots or self.num_slots

    def cut(slots):
      """The slots of one array."""
      sizes = (1, *slots.shape[1:3], num_slots, *slots.shape[4:])
      return jax.lax.dynamic_slice(slots, (layer, 0, 0, start, 0)[: slots.ndim], sizes)[0]

    k, v = jax.tree.map(cut, self.stored).decode(dtype)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def empty_slots(kept_as: type[KVFormat], shape: tuple[int, ...], dtype) -> KVFormat:
  """Empty slots [..., S, H] of a format."""
  like = jax.ShapeDtypeStruct(shape, dtype)
  shapes = jax.eval_shape(kept_as.encode, like, like)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def more_slots(slots: Array, axis: int, num_slots: int) -> Array:
  """The same slots, and more behind them. The old array is freed, after the host has copied it.

  Only an array that was tied to devices is tied to them again: every program is compiled for either
  kind by itself.
  """
  shape, sharding, is_tied = list(slots.shape), slots.sharding, slots.committed
  shape[axis] = num_slots

  def padded(shard):
    """What one device has."""
    more = [(0, 0)] * slots.ndim
    more[axis] = 0, shard.shape[axis] * num_slots // slots.shape[axis] - shard.shape[axis]
    return np.pad(shard, more)

  shards = [(padded(np.asarray(shard.data)), shard.device) for shard in slots.addressable_shards]
  slots.delete()
  if not is_tied:
    return jnp.asarray(shards[0][0])
  shards = [jax.device_put(*shard) for shard in shards]
  return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def shares(num_tokens: Array | np.ndarray | int, size: int, shards: int) -> Array | np.ndarray:
  """How many of the first tokens of a piece each of its equal parts has; a new last axis.

  shares(6, 8, 4) = [2, 2, 2, 0]
  """
  part = size // shards
  return (num_tokens - part * np.arange(shards)).clip(0, part)


def _attend_behind(q, layer, behind, layout) -> Partial:
  """Attention of all queries to all tokens of the caches that they stand behind."""
  # The rows that share a cache are read as one row of more queries, since its keys are read once.
  rows = q.reshape(len(behind), 1, -1, *q.shape[2:])
  parts = [
    cache.attend_in_order(layer, queries, cache.length - 1)
    for queries, cache in zip(rows, behind, strict=True)
  ]
  out, lse = (jnp.concatenate(x) for x in zip(*parts, strict=True))
  part = Partial(out.reshape(q.shape), lse.reshape(q.shape[:-1]))
  return _merge_shards(part, layout, jax.lax.psum) if layout.slot_shards > 1 else part


_gather_tokens = functools.partial(jax.lax.all_gather, axis=1, tiled=True)
_split_tokens = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)


def _merge_shards(part, layout, add_up):
  """Merges the attention of the same queries to the slots of all devices.

  Args:
    part: attention to the slots of this device.
    layout: over which mesh axes the slots are split.
    add_up: `psum`, or `_split_tokens` for a device to keep its own queries alone.
  """
  highest = layout.reduce_over(jax.lax.pmax, part.lse, "slots")
  share = jnp.exp(part.lse - highest)
  total = layout.reduce_over(add_up, share, "slots")
  out = layout.reduce_over(add_up, share[..., None] * part.out, "slots") / total[..., None]
  lse = layout.reduce_over(add_up, highest / layout.slot_shards, "slots") + jnp.log(total)
  return Partial(out, lse)
