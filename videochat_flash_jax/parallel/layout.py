"""How the arrays of one step lie on a mesh: what models are handed to run on many devices.

Without a mesh every method gives back what it got, so models are written once.
"""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.sharding import MESH_AXES

SEQUENCE_PARALLEL = ("all_gather", "ring")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and how attention reaches tokens on other devices.

  Attributes:
    mesh: from `make_mesh`; None for one device.
    sequence_parallel: "all_gather": keys and values of the whole row are gathered for each layer;
      "ring": they travel, and no device ever holds them all. Only read when `sequence` is split.
    zigzag: every array with a value per token is in the order of `zigzag_order`.
  """

  mesh: Mesh | None = None
  sequence_parallel: str = "ring"
  zigzag: bool = False

  def __post_init__(self):
    if self.sequence_parallel not in SEQUENCE_PARALLEL:
      raise InputError(
        f"sequence_parallel is {self.sequence_parallel!r}; choose {' or '.join(SEQUENCE_PARALLEL)}"
      )

  @property
  def sequence_shards(self) -> int:
    """Devices over which the tokens of a row are spread."""
    return 1 if self.mesh is None else self.mesh.shape["sequence"]

  def spec(self, *axes: str) -> PartitionSpec:
    """How an array with these named axes (keys of MESH_AXES) is split."""
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))

  def place(self, x: jax.Array, *axes: str) -> jax.Array:
    """Says how an activation is split; axes that are not named are whole."""
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*axes)))
