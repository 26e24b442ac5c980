"""What is split along which axis of the mesh: two small tables.

`WEIGHTS` names the axes of every weight by its path; `MESH_AXES` says which axis of the mesh a
named axis is split along. The state of an optimiser has its weights' paths in it, and follows them.

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
  "layer": None,  # visited one after another
  "width": ("fsdp", "sequence"),  # gathered when the layer's turn comes
  "heads": "tensor",
  "mlp": "tensor",
  "contracting": ("tensor", "fsdp", "sequence"),  # heads or MLP; once gathered, over `tensor` alone
  "vocabulary": "tensor",
  "whole": None,
  "batch": ("data", "fsdp"),
  "sequence": "sequence",
  "clips": ("sequence", "tensor"),  # of a row; with the rows, over all axes
}
# Of a layer whose turn has come; and always at inference, lest weights travel for every token.
REPLICATED_AXES = {**MESH_AXES, "width": None, "contracting": "tensor"}

# End of a path -> named axes of one layer's array; behind `stacked`, "layer" comes before them.
# Clips are split along all axes, so the encoder and the connector split no product over `tensor`.
WEIGHTS: tuple[tuple[str, tuple[str, ...]], ...] = (
  (r"embed_tokens\.embedding", ("vocabulary", "width")),
  (r"lm_head\.kernel", ("width", "vocabulary")),
  (r"decoder\..*\.[qkv]_proj\.kernel", ("width", "heads")),
  (r"decoder\..*\.[qkv]_proj\.bias", ("heads",)),
  (r"decoder\..*\.o_proj\.kernel", ("contracting", "whole")),
  (r"decoder\..*\.(gate|up)_proj\.kernel", ("width", "mlp")),
  (r"decoder\..*\.down_proj\.kernel", ("contracting", "whole")),
  (r"(vision|connector)\..*\.kernel", ("whole", "width")),
  # Adapters [in, rank] and [rank, out] are split as the kernel beside them; never along their rank.
  (r"decoder\..*\.([qkv]|gate|up)_proj\.lora_a", ("width", "whole")),
  (r"decoder\..*\.[qkv]_proj\.lora_b", ("whole", "heads")),
  (r"decoder\..*\.(gate|up)_proj\.lora_b", ("whole", "mlp")),
  (r"decoder\..*\.(o|down)_proj\.lora_a", ("contracting", "whole")),
  (r".*\.lora_b", ("whole", "width")),
  (r".*", ()),  # norms, biases, positions: small, and whole on every device
)


def weight_spec(path: str, ndim: int, *, replicated: bool = False) -> PartitionSpec:
  """How the array of a path is split, as a spec over the mesh's axes.

  Args:
    path: such as `decoder.layers.stacked.up_proj.kernel`.
    ndim: number of axes of the array.
    replicated: as inference keeps it, and training while its layer is computed: split over
      `tensor` alone, and replicated over the other axes.
  """
  names = next(names for ending, names in WEIGHTS if re.search(rf"(^|\.){ending}$", path))
  if ".stacked." in path and names:
    names = ("layer", *names)
  if names and len(names) != ndim:
    raise ValueError(f"{path} has {ndim} axes, but its rule names {len(names)}")
  axes = REPLICATED_AXES if replicated else MESH_AXES
  return PartitionSpec(*(axes[name] for name in names))


def weight_shardings(mesh: Mesh, weights: Any, *, replicated: bool = False) -> Any:
  """A sharding for every array of a tree whose paths end in those of weights.

  Args:
    mesh: from `make_mesh`.
    weights: nested dicts (or an optimiser's state) of arrays or their shapes.
    replicated: see `weight_spec`.

  Raises:
    InputError: an axis that cannot be split into as many parts, with its path.
  """

  def sharding(path, leaf):
    dotted = dotted_path(path)
    spec = weight_spec(dotted, leaf.ndim, replicated=replicated) if leaf.ndim else PartitionSpec()
    check_divides(mesh, spec, leaf.shape, dotted)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, weights)


def dotted_path(path: tuple) -> str:
  """The path that `jax.tree_util` or `nnx` gives a leaf, as `decoder.norm.scale`."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def check_divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], what: str):
  """Refuses a split into unequal parts.

  Raises:
    InputError: names `what`, the axis, and the mesh axis that does not divide it.
  """
  for axis, (size, split) in enumerate(zip(shape, spec, strict=False)):
    names = (split,) if isinstance(split, str) else split or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      remedy = "change the mesh"
      if "fsdp" in names:
        remedy = "make their product a divisor of it, and give mesh.data the rest"
      raise InputError(
        f"{what} {shape}: axis {axis} of {size} cannot be split into {parts} equal parts "
        f"(mesh.{' x mesh.'.join(names)}); {remedy}"
      )
