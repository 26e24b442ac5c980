"""The sizes of a mesh of devices, and the choices of sequence parallelism; needs no jax.

`mesh.py` builds the mesh from a `MeshConfig`, and its docstring says what each axis splits.
"""

import dataclasses
import math

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import Rule, argument, count, field, is_integer

AXES = ("data", "fsdp", "sequence", "tensor")
SEQUENCE_PARALLEL = ("none", "all_gather", "ring")
_SIZES = Rule(
  lambda size: is_integer(size) and (size > 0 or size == -1),
  "a positive number, or -1 for the remaining devices",
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices the mesh has along each axis.

  One axis may be -1: it gets all remaining devices. Slices of TPUs are joined by the data-centre
  network. They are neighbours along `data`, so only `data` communicates over this slow network.
  """

  data: int = field(1, _SIZES, "Devices among which rows are split; each has all weights.")
  fsdp: int = field(-1, _SIZES, "Devices among which rows, and weights, are split.")
  sequence: int = field(
    1, _SIZES, "Devices among which the tokens of a row, and weights, are split."
  )
  tensor: int = field(1, _SIZES, "Devices among which heads, MLPs and the vocabulary are split.")
  num_slices: int = field(1, count(), "Slices of TPUs; mesh.data must be a multiple of them.")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
  """Returns the sizes of the four axes, with the number of devices in place of -1.

  `MeshConfig(sequence=4)` on 8 devices gives (1, 2, 4, 1).

  Raises:
    InputError: a size is not positive, more than one is -1, their product is not the number of
      devices, or `num_slices` does not divide `data`.
  """
  sizes = [getattr(config, axis) for axis in AXES]
  sizes = [argument(f"mesh.{axis}", size, _SIZES) for axis, size in zip(AXES, sizes, strict=True)]
  num_slices = argument("mesh.num_slices", config.num_slices, count())
  if sizes.count(-1) > 1:
    raise InputError(
      f"mesh: {' and '.join(_free_axes(sizes))} are -1: set all but one of them to a number"
    )
  given = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and num_devices % given == 0:
    sizes[sizes.index(-1)] = num_devices // given
  if math.prod(sizes) != num_devices:
    shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    remedy = "change a size" if -1 in sizes else "change a size, or set one axis to -1"
    raise InputError(f"mesh: {shape} do not multiply to the {num_devices} devices; {remedy}")
  if sizes[0] % num_slices:
    raise InputError(
      f"mesh.num_slices is {num_slices}, but mesh.data is {sizes[0]}: "
      "set mesh.data to a multiple of mesh.num_slices"
    )
  return tuple(sizes)


def _free_axes(sizes):
  return [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
