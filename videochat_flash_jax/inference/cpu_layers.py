"""How the engine keeps a decoder on a CPU: every layer has its weights and its cache by itself.

XLA on the CPU copies the weights of each layer out of a stack before it computes with them, and
copies a stacked cache for every new token. That takes four fifths of the speed of decoding.
`unstack_decoder` gives a decoder a list of layers and a cache of one array per layer instead. Both
have the methods of `LayerStack` and `KVCache`, so the decoder runs as before.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.models.qwen2 import Qwen2
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
  """A `KVCache` with one array per layer. Rows and heads share an axis.

  In any other shape XLA on the CPU copies all slots for every new token.
  """

  k: tuple[Float[Array, "BK S H"], ...]
  v: tuple[Float[Array, "BK S H"], ...]
  length: Int[Array, "B"]

  @classmethod
  def empty(
    cls, config: DecoderConfig, batch: int, num_slots: int, *, depth: int, dtype=jnp.float32
  ) -> "LayerListCache":
    """As `KVCache.empty`."""
    shape = (batch * config.num_kv_heads, num_slots, config.head_size)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(depth)) for _ in "kv")
    return cls(k, v, jnp.zeros((batch,), jnp.int32))

  @property
  def num_slots(self) -> int:
    """Tokens that fit into a row."""
    return self.k[0].shape[1]

  def widened(self, num_slots: int) -> "LayerListCache":
    """As `KVCache.widened`."""
    padding = ((0, 0), (0, num_slots - self.num_slots), (0, 0))
    k, v = (tuple(jnp.pad(layer, padding) for layer in layers) for layers in (self.k, self.v))
    return self._replace(k=k, v=v)

  def write(
    self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
  ) -> "LayerListCache":
    """As `KVCache.write`."""
    return self._replace(
      k=_write(self.k, layer, self.length, k), v=_write(self.v, layer, self.length, v)
    )

  def read(self, layer: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As `KVCache.read`."""
    shape = (len(self.length), -1, *self.k[0].shape[1:])
    return tuple(layers[layer].reshape(shape).swapaxes(1, 2) for layers in (self.k, self.v))


def _write(layers, layer, start, new):
  """Writes `new` [B, T, K, H] into one of `layers`, from slot `start[b]` of row b.

  A loop over rows writes in place. One scatter over all rows would copy the cache.
  """
  new = new.swapaxes(1, 2).astype(layers[layer].dtype)

  def write_row(row, written):
    """Writes the heads of one row."""
    return jax.lax.dynamic_update_slice(written, new[row], (row * new.shape[1], start[row], 0))

  written = jax.lax.fori_loop(0, len(new), write_row, layers[layer])
  return (*layers[:layer], written, *layers[layer + 1 :])
