"""What a decoder, or a part of its layers, remembers of the tokens it has read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int


class KVCache(NamedTuple):
  """Keys and values of the tokens read so far; row b uses its first `length[b]` slots.

  Stacked layers share an array [L, B, K, S, H]. Layers apart (see `models/layer_stack.py`) have
  one each, [B * K, S, H]: in any other shape XLA on the CPU copies all slots for every new token.
  """

  k: Float[Array, "L B K S H"] | tuple[Float[Array, "BK S H"], ...]
  v: Float[Array, "L B K S H"] | tuple[Float[Array, "BK S H"], ...]
  length: Int[Array, "B"]

  @classmethod
  def empty(
    cls,
    config: DecoderConfig,
    batch: int,
    num_slots: int,
    *,
    apart: bool,
    depth: int | None = None,
    dtype=jnp.float32,
  ) -> "KVCache":
    """A cache for `num_slots` tokens a row in `depth` layers, by default all."""
    depth = depth or config.depth

    def slots():
      heads, shape = config.num_kv_heads, (num_slots, config.head_size)
      if apart:
        return tuple(jnp.zeros((batch * heads, *shape), dtype) for _ in range(depth))
      return jnp.zeros((depth, batch, heads, *shape), dtype)

    return cls(slots(), slots(), jnp.zeros((batch,), jnp.int32))

  @property
  def depth(self) -> int:
    """Layers that it remembers for."""
    return len(self.k)

  @property
  def num_slots(self) -> int:
    """Tokens that fit into a row."""
    return jax.tree.leaves(self.k)[0].shape[-2]

  def widened(self, num_slots: int) -> "KVCache":
    """The same cache with room for `num_slots` tokens a row, at least as many as now."""
    more = [(0, num_slots - self.num_slots), (0, 0)]
    k, v = jax.tree.map(
      lambda slots: jnp.pad(slots, [(0, 0)] * (slots.ndim - 2) + more), (self.k, self.v)
    )
    return self._replace(k=k, v=v)

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
    """Remembers new tokens of one layer, and what each of them sees: itself and all before it.

    On a mesh (stacked layers only) every device does so for its own rows and heads: keys and
    values never travel.

    Args:
      layer: counted from the first that this cache is for.
      q: queries of the new tokens.
      k: their keys.
      v: their values.
      is_empty: nothing was read before; attention in array order is cheaper.
      layout: how rows and heads lie on a mesh.

    Returns:
      Mixed values, and the cache, whose `length` stays as it is.
    """

    def attend(layer, q, k, v, cache):
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
    """Puts new tokens of one layer behind those that count; `length` stays as it is."""
    return self._replace(
      k=_write(self.k, layer, self.length, k), v=_write(self.v, layer, self.length, v)
    )

  def read(
    self, layer: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """All slots of one layer, as `ops.attention` takes them."""
    batch, (*_, num_slots, head_size) = len(self.length), jax.tree.leaves(self.k)[0].shape
    shape = (batch, -1, num_slots, head_size)
    return tuple(slots[layer].reshape(shape).swapaxes(1, 2) for slots in (self.k, self.v))


def _write(slots, layer, start, new):
  """Writes `new` [B, T, K, H] into a layer of `slots`, from slot `start[b]` of row b.

  Row by row, which happens in place; one scatter over all rows would copy the cache.
  """
  new = new.swapaxes(1, 2).astype(jax.tree.leaves(slots)[0].dtype)
  if not isinstance(slots, tuple):
    for row in range(len(new)):
      at = (layer, row, 0, start[row], 0)
      slots = jax.lax.dynamic_update_slice(slots, new[None, row : row + 1], at)
    return slots

  def write_row(row, written):
    at = (row * new.shape[1], start[row], 0)
    return jax.lax.dynamic_update_slice(written, new[row], at)

  written = jax.lax.fori_loop(0, len(new), write_row, slots[layer])
  return (*slots[:layer], written, *slots[layer + 1 :])
