"""The KV cache: keys and values of the tokens that a decoder, or a part of its layers, has read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int


class KVCache(NamedTuple):
  """Keys and values of the tokens read so far. Row b uses its first `length[b]` slots."""

  k: Float[Array, "L B K S H"]
  v: Float[Array, "L B K S H"]
  length: Int[Array, "B"]

  @classmethod
  def empty(
    cls, config: DecoderConfig, batch: int, num_slots: int, *, depth: int, dtype=jnp.float32
  ) -> "KVCache":
    """A cache without tokens.

    Args:
      config: of the decoder.
      batch: number of rows.
      num_slots: tokens that fit into a row.
      depth: number of layers that the cache is for.
      dtype: of keys and values.
    """
    shape = (depth, batch, config.num_kv_heads, num_slots, config.head_size)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

  @property
  def depth(self) -> int:
    """Number of layers that the cache is for."""
    return len(self.k)

  @property
  def num_slots(self) -> int:
    """Tokens that fit into a row."""
    return self.k.shape[3]

  def widened(self, num_slots: int) -> "KVCache":
    """The same tokens in a cache of `num_slots` slots per row, at least as many as now."""
    padding = ((0, 0), (0, 0), (0, 0), (0, num_slots - self.num_slots), (0, 0))
    return self._replace(k=jnp.pad(self.k, padding), v=jnp.pad(self.v, padding))

  def attend(
    self,
    layer: int | Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    is_empty: bool = False,
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B T N H"], "KVCache"]:
    """Writes new tokens into one layer of the cache, then computes their causal attention.

    A new token attends to itself, to the new tokens before it, and to all tokens in the cache. On
    a mesh every device does this for its own rows and heads, so no key or value is sent between
    devices.

    Args:
      layer: index of the layer, counted from the first one that this cache is for.
      q: queries of the new tokens.
      k: keys of the new tokens.
      v: values of the new tokens.
      is_empty: the cache has no tokens yet, so the attention is that of the new tokens alone,
        which costs less.
      layout: how rows and heads are split over a mesh.

    Returns:
      The output of the attention; and the cache, with the same `length` as before.
    """

    def attend(layer, q, k, v, cache):
      """Does the same for the rows and heads of one device."""
      cache = cache.write(layer, k, v)
      if is_empty:
        return attention(q, k, v, causal=True), cache
      order = cache.length[:, None] + jnp.arange(q.shape[1])[None]
      return attention(q, *cache.read(layer), causal=True, query_order=order), cache

    heads, slots = ("batch", "sequence", "heads"), ("layer", "batch", "heads")
    cache_axes = KVCache(slots, slots, ("batch",))
    local = layout.shard_map(attend, ((), heads, heads, heads, cache_axes), (heads, cache_axes))
    return local(layer, q, k, v, self)

  def write(
    self, layer: int | Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
  ) -> "KVCache":
    """Writes new tokens into one layer, after its `length` first tokens. `length` stays."""
    return self._replace(
      k=_write(self.k, layer, self.length, k), v=_write(self.v, layer, self.length, v)
    )

  def read(
    self, layer: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Keys and values in all slots of one layer, in the axis order of `ops.attention`."""
    return self.k[layer].swapaxes(1, 2), self.v[layer].swapaxes(1, 2)


def _write(slots, layer, start, new):
  """Writes `new` [B, T, K, H] into one layer of `slots`, from slot `start[b]` of row b.

  Writing row by row happens in place. One scatter over all rows would copy the cache.
  """
  new = new.swapaxes(1, 2).astype(slots.dtype)
  for row in range(len(new)):
    at = (layer, row, 0, start[row], 0)
    slots = jax.lax.dynamic_update_slice(slots, new[None, row : row + 1], at)
  return slots
