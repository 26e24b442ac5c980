"""How the engine keeps a decoder on a CPU: every layer has its weights and its cache by itself.

XLA on the CPU copies the weights of each layer out of a stack before it computes with them, and
copies a stacked cache for every new token. That takes four fifths of the speed of decoding.
`unstack_decoder` gives a decoder a list of layers and a cache of one array per layer instead. Both
have the methods of `LayerStack` and `KVCache`, so the decoder runs as before.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.kv_cache import KVCache, empty_slots, more_slots
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.ops.kv_formats import KVFormat, Wide
from videochat_flash_jax.shapes import Array, Float, Int


def unstack_decoder(decoder: Qwen2) -> None:
  """Gives a decoder a `LayerList` and `LayerListCache`s, in place. Its stacked arrays are freed."""
  decoder.layers = unstack(decoder.layers)
  decoder.cache_type = LayerListCache


def unstack(stack: LayerStack) -> "LayerList":
  """The layers of a stack, each with arrays of its own. The stack must not be used afterwards.

  Each stacked array is freed as soon as it is split, so that the peak memory is one array more.
  """
  graph, weights = nnx.split(stack.stacked)
  leaves, treedef = jax.tree.flatten(weights)
  split = []
  for leaf in leaves:
    split.append([leaf[i] for i in range(stack.depth)])
    if isinstance(leaf, Array):
      leaf.delete()
  layers = [nnx.merge(graph, treedef.unflatten(layer)) for layer in zip(*split, strict=True)]
  return LayerList(layers)


class LayerList(nnx.Module):
  """Layers with weights of their own. They are used as those of a `LayerStack`."""

  def __init__(self, layers: list[nnx.Module]):
    self.layers = nnx.List(layers)

  def run(self, apply: Callable, carry: tuple) -> tuple:
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer."""
    for index, layer in enumerate(self.layers):
      carry = apply(layer, index, carry)
    return carry

  def run_part(self, apply: Callable, carry: tuple, layers: range) -> tuple[tuple, "LayerList"]:
    """Does the same as `run` with some consecutive layers; returns the carry and this list."""
    for index in layers:
      carry = apply(self.layers[index], index, carry)
    return carry, self

  def layer(self, index: int) -> nnx.Module:
    """One layer by itself."""
    return self.layers[index]


class LayerListCache(KVCache):
  """A `KVCache` with arrays of their own for each layer. Rows and heads share an axis.

  In any other shape XLA on the CPU copies all slots for every new token.
  """

  stored: tuple[KVFormat, ...]  # of each layer: arrays [BK, S, H], and scales [BK, S]
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
  ) -> "LayerListCache":
    """As `KVCache.empty`."""
    shape = (batch * config.num_kv_heads, num_slots, config.head_size)
    stored = tuple(empty_slots(kept_as, shape, dtype) for _ in range(depth))
    return cls(stored, jnp.zeros((batch, shards), jnp.int32))

  @property
  def num_slots(self) -> int:
    """Tokens that fit into a row."""
    return self.stored[0][0].shape[1]

  @property
  def depth(self) -> int:
    """Number of layers that the cache is for."""
    return len(self.stored)

  @property
  def kept_as(self) -> type[KVFormat]:
    """How keys and values are kept."""
    return type(self.stored[0])

  def widened(self, num_slots: int) -> "LayerListCache":
    """As `KVCache.widened`."""
    return self._replace(stored=jax.tree.map(lambda x: more_slots(x, 1, num_slots), self.stored))

  def _write(self, layer, k, v):
    """As `KVCache._write`. A loop over rows writes in place."""
    new = self.kept_as.encode(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def write(slots, new):
      """Writes into one array."""

      def write_row(row, written):
        """Writes the heads of one row."""
        at = (row * new.shape[1], self.length[row, 0], 0)[: slots.ndim]
        return jax.lax.dynamic_update_slice(written, new[row].astype(slots.dtype), at)

      return jax.lax.fori_loop(0, len(new), write_row, slots)

    written = jax.tree.map(write, self.stored[layer], new)
    return self._replace(stored=(*self.stored[:layer], written, *self.stored[layer + 1 :]))

  def _in_each_layer(self, change):
    """As `KVCache._in_each_layer`."""
    return functools.reduce(lambda cache, layer: change(layer, cache), range(self.depth), self)

  def read(
    self,
    layer: int,
    dtype,
    start: int | Int[Array, ""] = 0,
    num_slots: int | None = None,
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As `KVCache.read`."""

    def cut(slots):
      """The slots of one array."""
      if num_slots is not None:
        slots = jax.lax.dynamic_slice_in_dim(slots, start, num_slots, axis=1)
      return slots.reshape(len(self.length), -1, *slots.shape[1:])

    k, v = jax.tree.map(cut, self.stored[layer]).decode(dtype)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)
