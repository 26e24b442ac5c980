"""How weights and activations are sharded over the mesh: two small tables.

`WEIGHTS` gives every weight, by its path, a name for each of its axes. `MESH_AXES` gives each named
axis the axis of the mesh over which it is sharded. The paths in an optimiser's state contain the
paths of the weights, so its arrays are sharded as the weights are.

  decoder.layers.stacked.up_proj.kernel  [L, D, M]  ->  layer, width, mlp
                                                    ->  -, (fsdp, sequence), tensor
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from videochat_flash_jax.errors import InputError

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
  "layer": None,  # layers are computed one after another
  "width": ("fsdp", "sequence"),  # gathered when the layer is computed
  "heads": "tensor",
  "mlp": "tensor",
  # Heads or MLP, where the product sums over them; once gathered, sharded over `tensor` only.
  "contracting": ("tensor", "fsdp", "sequence"),
  "vocabulary": "tensor",
  "replicated": None,
  "batch": ("data", "fsdp"),
  "sequence": "sequence",
  "clips": ("sequence", "tensor"),  # of one row; together with the rows, over all four axes
}
# The sharding of a layer's weights while it is computed. At inference weights always have it;
# otherwise all of them would be sent between devices for every token. There every device also has
# all rows of a batch; what is long, a video, is split over all devices.
REPLICATED_AXES = {
  **MESH_AXES,
  "width": None,
  "contracting": "tensor",
  "batch": None,
  "sequence": None,
  "clips": ("data", "fsdp", "sequence", "tensor"),
  "slots": ("data", "fsdp", "sequence"),  # of a cache; and the tokens that are read into it
}

# End of a path (a regex) -> names of the axes of one layer's array. A path with `stacked` has the
# axis "layer" before these. Clips are sharded over all axes of the mesh, so the products of encoder
# and connector are not sharded over `tensor`.
WEIGHTS: tuple[tuple[str, tuple[str, ...]], ...] = (
  (r"embed_tokens\.embedding", ("vocabulary", "width")),
  (r"lm_head\.kernel", ("width", "vocabulary")),
  (r"decoder\..*\.[qkv]_proj\.kernel", ("width", "heads")),
  (r"decoder\..*\.[qkv]_proj\.bias", ("heads",)),
  (r"decoder\..*\.o_proj\.kernel", ("contracting", "replicated")),
  (r"decoder\..*\.(gate|up)_proj\.kernel", ("width", "mlp")),
  (r"decoder\..*\.down_proj\.kernel", ("contracting", "replicated")),
  (r"(vision|connector)\..*\.kernel", ("replicated", "width")),
  # Adapters [in, rank] and [rank, out] are sharded as the kernel beside them, but never over rank.
  (r"decoder\..*\.([qkv]|gate|up)_proj\.lora_a", ("width", "replicated")),
  (r"decoder\..*\.[qkv]_proj\.lora_b", ("replicated", "heads")),
  (r"decoder\..*\.(gate|up)_proj\.lora_b", ("replicated", "mlp")),
  (r"decoder\..*\.(o|down)_proj\.lora_a", ("contracting", "replicated")),
  (r".*\.lora_b", ("replicated", "width")),
  # Scales of int8 weights: one for each output, or each vocabulary id. Values are as the weight.
  (r"embed_tokens\.embedding\.scale", ("vocabulary", "replicated")),
  (r"lm_head\.kernel\.scale", ("replicated", "vocabulary")),
  (r"decoder\..*\.[qkv]_proj\.kernel\.scale", ("replicated", "heads")),
  (r"decoder\..*\.(gate|up)_proj\.kernel\.scale", ("replicated", "mlp")),
  (r".*", ()),  # norms, biases, position tables, other scales: small, and replicated
)


def weight_spec(path: str, ndim: int, *, replicated: bool = False) -> PartitionSpec:
  """The partition spec of a weight.

  `decoder.layers.stacked.up_proj.kernel` [L, D, M] has the spec
  (None, ("fsdp", "sequence"), "tensor").

  Args:
    path: such as `decoder.layers.stacked.up_proj.kernel`.
    ndim: number of axes of the array.
    replicated: if True, sharded over `tensor` only and replicated over the other axes, as inference
      keeps weights, and as training has them while their layer is computed.
  """
  path = path.removesuffix(".qvalue")
  names = next(names for ending, names in WEIGHTS if re.search(rf"(^|\.){ending}$", path))
  if ".stacked." in path and names:
    names = ("layer", *names)
  if names and len(names) != ndim:
    raise ValueError(f"{path} has {ndim} axes, but its rule names {len(names)}")
  axes = REPLICATED_AXES if replicated else MESH_AXES
  return PartitionSpec(*(axes[name] for name in names))


def is_small(path: str, ndim: int) -> bool:
  """Whether a weight is a vector of each layer, as norms and biases are, or replicated.

  Arguments are those of `weight_spec`.
  """
  is_vector = ndim - (".stacked." in path) < 2
  return is_vector or not any(weight_spec(path, ndim))


def weight_shardings(mesh: Mesh, weights: Any, *, replicated: bool = False) -> Any:
  """The sharding of every array in a tree of weights, or of an optimiser's state.

  Args:
    mesh: from `make_mesh`.
    weights: nested dicts (or an optimiser's state) of arrays or their shapes; the paths end in the
      paths of weights.
    replicated: see `weight_spec`.

  Raises:
    InputError: an axis cannot be split into equal parts; the message has the path of the weight.
  """

  def sharding(path, leaf):
    """The sharding of one array."""
    dotted = dotted_path(path)
    spec = weight_spec(dotted, leaf.ndim, replicated=replicated) if leaf.ndim else PartitionSpec()
    check_divides(mesh, spec, leaf.shape, dotted)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, weights)


def dotted_path(path: tuple) -> str:
  """The path that `jax.tree_util` or `nnx` gives a leaf, as `decoder.norm.scale`."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def check_divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], what: str):
  """Checks that a partition spec splits an array into equal parts.

  Args:
    mesh: from `make_mesh`.
    spec: of the array.
    shape: of the array.
    what: name of the array, for the error message.

  Raises:
    InputError: a part would be unequal. The message has `what`, the axis of the array, and the axis
      of the mesh that does not divide it.
  """
  for axis, (size, split) in enumerate(zip(shape, spec, strict=False)):
    names = (split,) if isinstance(split, str) else split or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      remedy = "change the mesh"
      if "fsdp" in names:
        remedy = "make their product a divisor of it, and put the remaining devices on mesh.data"
      raise InputError(
        f"{what} {shape}: axis {axis} of {size} cannot be split into {parts} equal parts "
        f"(mesh.{' x mesh.'.join(names)}); {remedy}"
      )
