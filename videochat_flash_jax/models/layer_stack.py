"""Equal layers, one after another: stacked for the compiler, or apart for the CPU.

Stacked weights carry a leading axis L and are visited by `lax.scan`, so that a program is
compiled for one layer whatever the depth. XLA on the CPU copies each layer's weights out of the
stack on the way, which costs four fifths of the speed of decoding: there, `unstack` them once.
"""

from collections.abc import Callable

import jax
from flax import nnx

from videochat_flash_jax.shapes import Array


class LayerStack(nnx.Module):
  """`depth` layers whose weights are stacked along a leading axis."""

  def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.depth = depth
    self.stacked = nnx.vmap(make_layer)(rngs.split(depth))

  def run(self, apply: Callable, carry: tuple):
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer.

    Each layer is recomputed in the backward pass; only the carries between layers are kept.
    """
    graph, weights = nnx.split(self.stacked)

    def body(carry, inputs):
      index, layer_weights = inputs
      return apply(nnx.merge(graph, layer_weights), index, carry), None

    body = jax.checkpoint(body, prevent_cse=False)
    carry, _ = jax.lax.scan(body, carry, (jax.numpy.arange(self.depth), weights))
    return carry

  def unstack(self) -> "LayerList":
    """The same layers with weights apart. This stack must not be used afterwards.

    Weights are taken apart one array at a time and freed, so that the peak is one array more.
    """
    graph, weights = nnx.split(self.stacked)
    leaves, treedef = jax.tree.flatten(weights)
    apart = []
    for leaf in leaves:
      apart.append([leaf[i] for i in range(self.depth)])
      if isinstance(leaf, Array):
        leaf.delete()
    layers = [nnx.merge(graph, treedef.unflatten(layer)) for layer in zip(*apart, strict=True)]
    return LayerList(layers)


class LayerList(nnx.Module):
  """Layers with weights of their own; same use as `LayerStack`."""

  def __init__(self, layers: list[nnx.Module]):
    self.layers = nnx.List(layers)

  def run(self, apply: Callable, carry: tuple):
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer."""
    for index, layer in enumerate(self.layers):
      carry = apply(layer, index, carry)
    return carry
