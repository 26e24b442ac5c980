"""`Layout`: how the arrays of one step are sharded over a mesh of devices.

Models receive a `Layout` and call its methods, so that the same code runs on one device and on
many. Without a mesh every method returns its input unchanged.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh_config import SEQUENCE_PARALLEL
from videochat_flash_jax.parallel.sharding import (
  MESH_AXES,
  REPLICATED_AXES,
  dotted_path,
  weight_spec,
)
from videochat_flash_jax.parallel.zigzag import unzigzag_order, zigzag_order


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh of devices, and how attention reads keys and values that other devices hold.

  Attributes:
    mesh: from `make_mesh`; None for one device.
    sequence_parallel: "none": each row is on one device. "all_gather": each layer gathers the keys
      and values of the whole row on every device. "ring": keys and values are sent around a ring
      of devices, and no device ever holds them all. "all_gather" and "ring" make a difference only
      if the mesh's axis `sequence` is larger than 1.
    zigzag: if True, every array with one value per token is in the order of `zigzag_order`.
    replicate_weights: if True, weights are sharded over `tensor` only and replicated over the
      other axes, as inference needs them. If False, weights are sharded over all axes but `data`,
      and each layer's weights are gathered when the layer is computed.
    compute_dtype: of products, and of all that devices send to each other but gradients of weights:
      they are sent, and summed, in the dtype in which a weight comes. None: weights come in the
      dtype of the computation.
  """

  mesh: Mesh | None = None
  sequence_parallel: str = "ring"
  zigzag: bool = False
  replicate_weights: bool = False
  compute_dtype: jnp.dtype | None = None

  def __post_init__(self):
    kind, shards = self.sequence_parallel, self.sequence_shards
    if kind not in SEQUENCE_PARALLEL:
      raise InputError(
        f"sequence_parallel is {kind!r:.80}; choose {' or '.join(SEQUENCE_PARALLEL)}"
      )
    if kind == "none" and shards > 1:
      raise InputError(
        f"sequence_parallel is 'none', but mesh.sequence is {shards}: choose ring or all_gather, "
        "or set mesh.sequence to 1"
      )

  @property
  def axes(self) -> Mapping[str, str | tuple[str, ...] | None]:
    """For each named array axis, the mesh axis (or axes, or None) over which it is sharded."""
    return REPLICATED_AXES if self.replicate_weights else MESH_AXES

  @property
  def slot_shards(self) -> int:
    """At inference, the number of devices over which the slots of one row's cache are split."""
    return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self.axes["slots"])

  @property
  def sequence_shards(self) -> int:
    """The number of devices over which the tokens of one row are sharded."""
    return 1 if self.mesh is None else self.mesh.shape["sequence"]

  def spec(self, *axes: str) -> PartitionSpec:
    """The partition spec of an array with these named axes (keys of `MESH_AXES`)."""
    return PartitionSpec(*(self.axes[axis] for axis in axes))

  def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
    """Fixes how an activation is sharded; trailing axes without a name are replicated.

    Args:
      x: any shape.
      *axes: names of the first axes of x, keys of `MESH_AXES`.
    """
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*axes)))

  def device_put(self, arrays: Any, *axes: str) -> Any:
    """Shards a tree of arrays over the mesh; the arrays may be on the host or on any device.

    On several hosts every process gives the same arrays.

    Args:
      arrays: a tree of arrays that all have the same named axes.
      *axes: names of their first axes, keys of `MESH_AXES`.
    """
    if self.mesh is None:
      return arrays
    sharding = NamedSharding(self.mesh, self.spec(*axes))
    # `jax.device_put` would send every array to all processes, to check that it is the same there.
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), arrays
    )

  def shard_map(self, function: Callable, inputs: Sequence[Any], output: Any) -> Callable:
    """Returns a function that runs `function` on every device, on that device's shards only.

    Args:
      function: takes arrays (or trees of arrays) and returns an array or a tree of arrays.
      inputs: one entry per argument: a tuple of axis names, or a tree of such tuples. For weights,
        give the nested dicts themselves: their paths say how each weight is sharded.
      output: axis names of the result, in the same form; one tuple may stand for all results.
    """
    if self.mesh is None:
      return function
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=tuple(
        self._weight_specs(axes) if isinstance(axes, dict) else self._specs(axes) for axes in inputs
      ),
      out_specs=self._specs(output),
      check_vma=False,  # the check rejects a `cond` whose branches vary over different axes
    )

  def shardings(self, axes: Any) -> Any:
    """The shardings of a tree of arrays, from a tree of tuples of named axes."""
    return jax.tree.map(
      lambda names: NamedSharding(self.mesh, self.spec(*names)), axes, is_leaf=_is_axis_names
    )

  def _specs(self, axes):
    return jax.tree.map(lambda names: self.spec(*names), axes, is_leaf=_is_axis_names)

  def _weight_specs(self, weights):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: weight_spec(
        dotted_path(path), leaf.ndim, replicated=self.replicate_weights
      ),
      weights,
    )

  def gather_layer(self, layer: nnx.Module, prefix: str) -> nnx.Module:
    """Gathers the weights of one layer just before it is computed.

    Afterwards they are sharded over `tensor` only, and replicated over the other axes. In the
    backward pass the gradients are sharded as the stored weights are: summed and split in one step.
    Weights are sent in the dtype of the computation, gradients in that of the weights, which they
    keep.

    Args:
      layer: one layer, taken out of its stack.
      prefix: path of the stack, such as "decoder.layers.stacked".
    """
    if self.mesh is None or self.replicate_weights:
      return layer

    def gather(path, leaf):
      """Gathers one weight of the layer."""
      path = f"{prefix}.{dotted_path(path)}"
      split, gathered = (
        NamedSharding(self.mesh, PartitionSpec(*weight_spec(path, leaf.ndim + 1, replicated=g)[1:]))
        for g in (False, True)
      )
      return _gather(leaf, split, gathered, self.products_in(leaf))

    graph, weights = nnx.split(layer)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(gather, nnx.to_pure_dict(weights)))

  def gather_shards(self, weights: dict) -> dict:
    """Gathers the weights of whole parts of a model; to be called inside `shard_map`.

    The result is sharded as that of `gather_layer`: over `tensor` only. It is float32, so that a
    loop which reads it in every round sums gradients in float32; convert it inside of the loop.
    Where weights are replicated, as at inference, they stay as they are.

    Args:
      weights: nested dicts of this device's shards, with paths as in `parallel.sharding`. They are
        sent in the dtype of the computation, and their gradients in their own.
    """
    if self.replicate_weights:
      return weights

    def gather(path, shard):
      """Gathers one weight from its shards on all devices."""
      if self.mesh is not None:
        dotted = dotted_path(path)
        split, gathered = (weight_spec(dotted, shard.ndim, replicated=g) for g in (False, True))
        for axis, (before, after) in enumerate(zip(split, gathered, strict=True)):
          if before != after:
            shard = _gather_shard(shard, axis, self.products_in(shard), shard.dtype)
      return shard.astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(gather, weights)

  def products_in(self, weight: jax.Array) -> jnp.dtype:
    """The dtype of products with a weight."""
    return weight.dtype if self.compute_dtype is None else self.compute_dtype

  def vocab_ids(self, num_ids: int) -> jax.Array:
    """The vocabulary ids [num_ids] in this device's shard; to be called inside `shard_map`.

    With `tensor` 2 and a vocabulary of 8, the devices have ids 0 1 2 3 and 4 5 6 7.

    Args:
      num_ids: how many vocabulary ids each device has.
    """
    return jnp.arange(num_ids) + num_ids * self.axis_index("vocabulary")

  def axis_index(self, axis: str) -> int | jax.Array:
    """The number of this device's shard along a named axis; to be called inside `shard_map`."""
    return 0 if self.mesh is None else jax.lax.axis_index(self.axes[axis])

  def reduce_over(self, collective: Callable, x: jax.Array, axis: str) -> jax.Array:
    """Reduces `x` over all shards of a named axis; to be called inside `shard_map`.

    Args:
      collective: `jax.lax.psum`, `jax.lax.pmax` or `jax.lax.pmean`.
      x: this device's array.
      axis: a key of `MESH_AXES`.
    """
    return x if self.mesh is None else collective(x, self.axes[axis])

  def from_zigzag(self, x: jax.Array) -> jax.Array:
    """Puts tokens [B, T, ...] back from this layout's order into the order of the text."""
    if not self.zigzag:
      return x
    return x[:, unzigzag_order(x.shape[1], self.sequence_shards)]

  def to_zigzag(self, x: jax.Array) -> jax.Array:
    """Puts tokens [B, T, ...] from the order of the text into the order of this layout."""
    if not self.zigzag:
      return x
    return x[:, zigzag_order(x.shape[1], self.sequence_shards)]


def _is_axis_names(axes):
  return isinstance(axes, tuple) and all(isinstance(name, str) for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight, split, gathered, sent_dtype):
  """Gathers a weight; the custom gradient is sharded as the stored weight is.

  Without it the compiler would sum whole gradients on every device, and then keep a part of them.
  """
  # Without the first constraint the compiler might gather before it converts.
  sent = jax.lax.with_sharding_constraint(weight.astype(sent_dtype), split)
  return jax.lax.with_sharding_constraint(sent, gathered).astype(weight.dtype)


def _gather_forward(weight, split, gathered, sent_dtype):
  return _gather(weight, split, gathered, sent_dtype), None


def _gather_backward(split, gathered, sent_dtype, _, gradient):
  return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_shard(shard, axis, sent_dtype, gradient_dtype):
  """Gathers a weight from its shards, in float32; its gradient is sent in `gradient_dtype`."""
  sent = shard.astype(sent_dtype)
  return jax.lax.all_gather(sent, MESH_AXES["width"], axis=axis, tiled=True).astype(jnp.float32)


def _gather_shard_forward(shard, axis, sent_dtype, gradient_dtype):
  return _gather_shard(shard, axis, sent_dtype, gradient_dtype), None


def _gather_shard_backward(axis, sent_dtype, gradient_dtype, _, gradient):
  gradient = gradient.astype(gradient_dtype)
  axes = MESH_AXES["width"]
  return (jax.lax.psum_scatter(gradient, axes, scatter_dimension=axis, tiled=True),)


_gather_shard.defvjp(_gather_shard_forward, _gather_shard_backward)

ONE_DEVICE = Layout()
