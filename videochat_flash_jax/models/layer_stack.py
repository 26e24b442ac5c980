"""Equal layers, one after another: stacked for the compiler, or apart for the CPU.

Stacked weights carry a leading axis L and are visited by `lax.scan`, so that a program is
compiled for one layer whatever the depth. XLA on the CPU copies each layer's weights out of the
stack on the way, which costs four fifths of the speed of decoding: there, `unstack` them once.
"""

from collections.abc import Callable

import jax
from flax import nnx

from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.shapes import Array


class LayerStack(nnx.Module):
  """`depth` layers whose weights are stacked along a leading axis.

  Attributes:
    depth: number of layers.
    remat: what of a layer the backward pass computes again: "full", everything, so that only the
      carries between layers are kept; "dots", all but products of matrices, which are kept; "none",
      nothing. On a mesh, "none" also keeps every layer's gathered weights.
    frozen: dotted paths, such as `q_proj.kernel`, of the weights for which `run_part` needs no
      gradients; it would make room for them otherwise.
  """

  def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.depth, self.remat, self.frozen = depth, "full", frozenset()
    self.stacked = nnx.vmap(make_layer)(rngs.split(depth))

  def run(self, apply: Callable, carry: tuple):
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer."""
    graph, weights = nnx.split(self.stacked)

    def body(carry, inputs):
      index, layer_weights = inputs
      return apply(nnx.merge(graph, layer_weights), index, carry), None

    carry, _ = jax.lax.scan(self._recomputed(body), carry, (jax.numpy.arange(self.depth), weights))
    return carry

  def run_part(self, apply: Callable, carry: tuple, layers: range) -> tuple[tuple, "LayerStack"]:
    """As `run`, for consecutive layers only, whose weights are read in place, never cut out.

    Returns:
      The carry, and this stack again: run the next part on that one. Then the gradients of all
      parts are written into one stack, each layer's into its place; otherwise every part would
      make a stack of its own, and zeros for all other layers, to be added up.
    """
    graph, weights = nnx.split(self.stacked)
    paths, treedef = jax.tree.flatten_with_path(nnx.to_pure_dict(weights))
    learns = [dotted_path(path) not in self.frozen for path, _ in paths]
    readable = [jax.lax.stop_gradient(leaf) for _, leaf in paths]
    stacks = [leaf if learns else None for (_, leaf), learns in zip(paths, learns, strict=True)]

    def body(state, index):
      carry, stacks = state
      leaves, stacks = _take_layer(readable, stacks, index)
      return (apply(nnx.merge(graph, treedef.unflatten(leaves)), index, carry), stacks), None

    indices = jax.numpy.arange(layers.start, layers.stop)
    (carry, stacks), _ = jax.lax.scan(self._recomputed(body), (carry, stacks), indices)
    leaves = [old if new is None else new for old, new in zip(readable, stacks, strict=True)]
    same = nnx.clone(self)
    same.stacked = nnx.merge(graph, treedef.unflatten(leaves))
    return carry, same

  def _recomputed(self, body):
    if self.remat == "none":
      return body
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, prevent_cse=False, policy=dots if self.remat == "dots" else None)

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
def _take_layer(readable, stacks, index):
  """Weights of one layer, read from `readable`; `stacks` pass by to have gradients put into them.

  Of those that are frozen, None passes by.
  """
  layer = [jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) for leaf in readable]
  return layer, stacks


def _take_layer_forward(readable, stacks, index):
  return _take_layer(readable, stacks, index), index


def _take_layer_backward(index, gradients):
  of_layer, of_stacks = gradients
  of_stacks = [
    None if stack is None else stack.at[index].add(new)
    for stack, new in zip(of_stacks, of_layer, strict=True)
  ]
  return None, of_stacks, None


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
