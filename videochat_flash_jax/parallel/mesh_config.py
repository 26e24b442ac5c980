"""The sizes of a mesh of devices, and the choices of sequence parallelism; needs no jax.

`mesh.py` builds the mesh from a `MeshConfig`, and its docstring says what each axis splits.
"""

import dataclasses
import math

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import field, integer

AXES = ("data", "fsdp", "sequence", "tensor")
SEQUENCE_PARALLEL = ("none", "all_gather", "ring")
_SIZES = integer("a positive integer, or -1 for what is left")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices stand along each axis; -1 takes those that are left, once.

  With several slices (pods joined by the data-centre network), `data` counts them first: its
  neighbours are the only ones that talk over the slow network.
  """

  data: int = field(1, _SIZES, "Devices among which rows are split; each has all weights.")
  fsdp: int = field(-1, _SIZES, "Devices among which rows, and weights, are split.")
  sequence: int = field(1, _SIZES, "Devices among which the tokens of a row are split.")
  tensor: int = field(1, _SIZES, "Devices among which heads, MLPs and the vocabulary are split.")
  num_slices: int = field(1, integer(), "Slices of TPUs; they stand along `data`.")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
  """Sizes of the four axes for so many devices.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  sizes = [getattr(config, axis) for axis in AXES]
  for axis, size in zip(AXES, sizes, strict=True):
    if size != -1 and size < 1:
      raise InputError(f"mesh.{axis} is {size}: give a positive number, or -1 for what is left")
  if sizes.count(-1) > 1:
    raise InputError(f"mesh: {' and '.join(_free_axes(sizes))} are -1: leave only one axis free")
  given = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and num_devices % given == 0:
    sizes[sizes.index(-1)] = num_devices // given
  if math.prod(sizes) != num_devices:
    shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    remedy = "change a size" if -1 in sizes else "change a size, or give -1 to one axis"
    raise InputError(f"mesh: {shape} do not make the {num_devices} devices; {remedy}")
  if config.num_slices < 1 or sizes[0] % config.num_slices:
    raise InputError(
      f"mesh.num_slices is {config.num_slices}, but mesh.data is {sizes[0]}: "
      "give data a multiple of the slices"
    )
  return tuple(sizes)


def _free_axes(sizes):
  return [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
