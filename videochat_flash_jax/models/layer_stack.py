"""A stack of equal layers, run by a scan."""

from collections.abc import Callable

import jax
from flax import nnx

from videochat_flash_jax.ops.linear import PRODUCT
from videochat_flash_jax.parallel.sharding import dotted_path


class LayerStack(nnx.Module):
  """`depth` layers with the same shapes. Their weights are stacked along a leading axis L.

  `lax.scan` visits the layers, so XLA compiles one layer, whatever the depth.

  Attributes:
    depth: number of layers.
    remat: what the backward pass computes again. "full": everything in a layer, so only the carry
      between layers is kept. "dots": everything but matrix products, which are kept. "none":
      nothing. On a mesh, "none" also keeps the gathered weights of every layer.
    frozen: dotted paths, such as `q_proj.kernel`, of weights that need no gradient. `run_part` then
      allocates none for them.
  """

  def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
    self.depth, self.remat, self.frozen = depth, "full", frozenset()
    self.stacked = nnx.vmap(make_layer)(rngs.split(depth))

  def run(self, apply: Callable, carry: tuple) -> tuple:
    """Returns `carry` after `carry = apply(layer, layer_index, carry)` for every layer."""
    graph, weights = nnx.split(self.stacked)

    def body(carry, inputs):
      """One layer, from its slice of the weights."""
      index, layer_weights = inputs
      return apply(nnx.merge(graph, layer_weights), index, carry), None

    carry, _ = jax.lax.scan(self._remat(body), carry, (jax.numpy.arange(self.depth), weights))
    return carry

  def run_part(self, apply: Callable, carry: tuple, layers: range) -> tuple[tuple, "LayerStack"]:
    """As `run`, for some consecutive layers. Their weights are read from the stack, not copied.

    Returns:
      The carry; and a stack with the same weights. Run the next part on that stack. The gradients
      of all parts then go into one stack, where each layer fills its own index. If all parts ran on
      the same stack, autodiff would make one stack of gradients per part, with zeros for all other
      layers, and add them up.
    """
    graph, weights = nnx.split(self.stacked)
    paths, treedef = jax.tree.flatten_with_path(nnx.to_pure_dict(weights))
    is_trained = [dotted_path(path) not in self.frozen for path, _ in paths]
    readable = [jax.lax.stop_gradient(leaf) for _, leaf in paths]
    stacks = [
      leaf if trained else None for (_, leaf), trained in zip(paths, is_trained, strict=True)
    ]

    def body(state, index):
      """One layer, which `_take_layer` reads from the whole stack."""
      carry, stacks = state
      leaves, stacks = _take_layer(readable, stacks, index)
      return (apply(nnx.merge(graph, treedef.unflatten(leaves)), index, carry), stacks), None

    indices = jax.numpy.arange(layers.start, layers.stop)
    (carry, stacks), _ = jax.lax.scan(self._remat(body), (carry, stacks), indices)
    leaves = [old if new is None else new for old, new in zip(readable, stacks, strict=True)]
    same = nnx.clone(self)
    same.stacked = nnx.merge(graph, treedef.unflatten(leaves))
    return carry, same

  def _remat(self, body):
    if self.remat == "none":
      return body
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
    )
    return jax.checkpoint(body, prevent_cse=False, policy=dots if self.remat == "dots" else None)

  def layer(self, index: int) -> nnx.Module:
    """One layer by itself. Its gradient would be as large as the whole stack."""
    graph, weights = nnx.split(self.stacked)
    return nnx.merge(graph, jax.tree.map(lambda stack: stack[index], weights))


@jax.custom_vjp
def _take_layer(readable, stacks, index):
  """Reads the weights of one layer from `readable`, and returns `stacks` unchanged.

  The backward pass adds the layer's gradients into those of `stacks`, at its index. A frozen weight
  has None in `stacks`.
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
