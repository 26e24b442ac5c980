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

  def run_part(self, apply: Callable, carry: tuple, layers: range) -> tuple[tuple, "LayerStack"]:
    """As `run`, for consecutive layers only, whose weights are read in place, never cut out.

    Returns:
      The carry, and this stack again: run the next part on that one. Then the gradients of all
      parts are written into one stack, each layer's into its place; otherwise every part would
      make a stack of its own, and zeros for all other layers, to be added up.
    """
    graph, weights = nnx.split(self.stacked)
    readable = jax.lax.stop_gradient(weights)

    def body(state, index):
      carry, weights = state
      layer_weights, weights = _take_layer(readable, weights, index)
      return (apply(nnx.merge(graph, layer_weights), index, carry), weights), None

    body = jax.checkpoint(body, prevent_cse=False)
    indices = jax.numpy.arange(layers.start, layers.stop)
    (carry, weights), _ = jax.lax.scan(body, (carry, weights), indices)
    same = nnx.clone(self)
    same.stacked = nnx.merge(graph, weights)
    return carry, same

  def layer(self, index: int) -> nnx.Module:
    """One layer by itself; its gradients would take a whole stack."""
    graph, weights = nnx.split(self.stacked)
    return nnx.merge(graph, jax.tree.map(lambda stack: stack[index], weights))

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


@jax.custom_vjp
def _take_layer(readable, stack, index):
  """Weights of one layer, read from `readable`; `stack` passes by to have gradients put into it."""
  layer = jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), readable
  )
  return layer, stack


def _take_layer_forward(readable, stack, index):
  return _take_layer(readable, stack, index), index


def _take_layer_backward(index, gradients):
  of_layer, of_stack = gradients
  of_stack = jax.tree.map(lambda stack, new: stack.at[index].add(new), of_stack, of_layer)
  return None, of_stack, None


_take_layer.defvjp(_take_layer_forward, _take_layer_backward)


class LayerList(nnx.Module):
  """Layers with weights of their own; same use as `LayerStack`."""

  def __init__(self, layers: list[nnx.Module]):
    self.layers = nnx.List(layers)

  def run(self, apply: Callable, carry: tuple):
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer."""
    for index, layer in enumerate(self.layers):
      carry = apply(layer, index, carry)
    return carry

  def run_part(self, apply: Callable, carry: tuple, layers: range) -> tuple[tuple, "LayerList"]:
    """As `run`, for consecutive layers only; also returns this list, as `LayerStack` does."""
    for index in layers:
      carry = apply(self.layers[index], index, carry)
    return carry, self

  def layer(self, index: int) -> nnx.Module:
    """One layer by itself."""
    return self.layers[index]
