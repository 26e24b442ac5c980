"""How the arrays of one step lie on a mesh: what models are handed to run on many devices.

Without a mesh every method gives back what it got, so models are written once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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
  """A mesh, and how attention reaches tokens on other devices.

  Attributes:
    mesh: from `make_mesh`; None for one device.
    sequence_parallel: "none": a row is on one device; "all_gather": keys and values of the whole
      row are gathered for each layer; "ring": they travel, and no device ever holds them all. The
      latter two are read only when `sequence` is split.
    zigzag: every array with a value per token is in the order of `zigzag_order`.
    replicate_weights: weights are split over `tensor` alone and replicated over the other axes,
      as inference keeps them. Otherwise each layer's weights are gathered when it is computed.
  """

  mesh: Mesh | None = None
  sequence_parallel: str = "ring"
  zigzag: bool = False
  replicate_weights: bool = False

  def __post_init__(self):
    kind, shards = self.sequence_parallel, self.sequence_shards
    if kind not in SEQUENCE_PARALLEL:
      raise InputError(f"sequence_parallel is {kind!r}; choose {' or '.join(SEQUENCE_PARALLEL)}")
    if kind == "none" and shards > 1:
      raise InputError(
        f"sequence_parallel is 'none', but mesh.sequence is {shards}: choose ring or all_gather, "
        "or set mesh.sequence to 1"
      )

  @property
  def axes(self) -> Mapping[str, str | tuple[str, ...] | None]:
    """The axis of the mesh along which a named axis is split, or several, or None."""
    return REPLICATED_AXES if self.replicate_weights else MESH_AXES

  @property
  def row_shards(self) -> int:
    """Devices, or groups of them, over which the rows of a batch are spread."""
    return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self.axes["batch"])

  @property
  def sequence_shards(self) -> int:
    """Devices over which the tokens of a row are spread."""
    return 1 if self.mesh is None else self.mesh.shape["sequence"]

  def spec(self, *axes: str) -> PartitionSpec:
    """How an array with these named axes (keys of MESH_AXES) is split."""
    return PartitionSpec(*(self.axes[axis] for axis in axes))

  def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
    """Says how an activation is split; axes that are not named are whole."""
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*axes)))

  def device_put(self, arrays: Any, *axes: str) -> Any:
    """Spreads a tree of arrays, which need not be on the mesh yet, over its devices."""
    if self.mesh is None:
      return arrays
    return jax.device_put(arrays, NamedSharding(self.mesh, self.spec(*axes)))

  def shard_map(self, function: Callable, inputs: Sequence[Any], output: Any) -> Callable:
    """Makes `function` run on every device with that device's shards alone.

    Args:
      function: of arrays (or trees of them), to arrays.
      inputs: for each argument the names of its axes, as a tuple, or a tree of such; for nested
        dicts of weights, these dicts, whose paths tell.
      output: as of an input, for the result; or one for all of several.
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
      check_vma=False,  # the check knows no `cond` whose branches differ in what varies
    )

  def _specs(self, axes):
    return jax.tree.map(lambda names: self.spec(*names), axes, is_leaf=_are_names)

  def _weight_specs(self, weights):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: weight_spec(
        dotted_path(path), leaf.ndim, replicated=self.replicate_weights
      ),
      weights,
    )

  def gather_layer(self, layer: nnx.Module, prefix: str) -> nnx.Module:
    """One layer of a stack, whose turn has come, split over `tensor` alone.

    Gradients are split again as the weights were, device by device as they are summed.

    Args:
      layer: cut out of the stack.
      prefix: path of the stack, such as "decoder.layers.stacked".
    """
    if self.mesh is None or self.replicate_weights:
      return layer

    def gather(path, leaf):
      path = f"{prefix}.{dotted_path(path)}"
      split, gathered = (
        NamedSharding(self.mesh, PartitionSpec(*weight_spec(path, leaf.ndim + 1, replicated=g)[1:]))
        for g in (False, True)
      )
      return _gather(leaf, split, gathered)

    graph, weights = nnx.split(layer)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(gather, nnx.to_pure_dict(weights)))

  def gather_shards(self, weights: dict) -> dict:
    """As `gather_layer`, for whole parts of a model, inside of `shard_map`.

    Args:
      weights: nested dicts of this device's shards, with paths as in `parallel.sharding`.
    """
    if self.mesh is None or self.replicate_weights:
      return weights

    def gather(path, shard):
      dotted = dotted_path(path)
      split, gathered = (weight_spec(dotted, shard.ndim, replicated=g) for g in (False, True))
      for axis, (before, after) in enumerate(zip(split, gathered, strict=True)):
        if before != after:
          shard = jax.lax.all_gather(shard, MESH_AXES["width"], axis=axis, tiled=True)
      return shard

    return jax.tree_util.tree_map_with_path(gather, weights)

  def vocab_ids(self, num_words: int) -> jax.Array:
    """Inside of `shard_map`: ids of this device's share of the vocabulary, of so many words."""
    return jax.numpy.arange(num_words) + num_words * self.axis_index("vocabulary")

  def axis_index(self, axis: str) -> int | jax.Array:
    """Inside of `shard_map`: which shard of a named axis this device has."""
    return 0 if self.mesh is None else jax.lax.axis_index(self.axes[axis])

  def reduce_over(self, collective: Callable, x: jax.Array, axis: str) -> jax.Array:
    """Inside of `shard_map`: `jax.lax.psum`, `pmax` or `pmean` over the shards of a named axis."""
    return x if self.mesh is None else collective(x, self.axes[axis])

  def from_zigzag(self, x: jax.Array) -> jax.Array:
    """An array with a value per token [B, T, ...] in the order of the text."""
    if not self.zigzag:
      return x
    return x[:, unzigzag_order(x.shape[1], self.sequence_shards)]

  def to_zigzag(self, x: jax.Array) -> jax.Array:
    """The inverse of `from_zigzag`: as this layout keeps the tokens."""
    if not self.zigzag:
      return x
    return x[:, zigzag_order(x.shape[1], self.sequence_shards)]


def _are_names(axes):
  return isinstance(axes, tuple) and all(isinstance(name, str) for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, split, gathered):
  """Else the compiler would sum whole gradients on every device, to keep a part of them."""
  return jax.lax.with_sharding_constraint(weight, gathered)


def _gather_forward(weight, split, gathered):
  return _gather(weight, split, gathered), None


def _gather_backward(split, gathered, _, gradient):
  return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)

ONE_DEVICE = Layout()
