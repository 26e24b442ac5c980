"""Rings of chips go from link to link, and close."""

import dataclasses

import numpy as np
import pytest
from jax.experimental import mesh_utils

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

# Slices, and chips of a ring.
RINGS = [
  ("v5e:2x2", 2),
  ("v5e:2x2", 4),
  ("v5e:2x4", 8),
  ("v5e:4x4", 16),
  ("v5e:8x8", 4),
  ("v5e:8x8", 8),
  ("v5e:8x8", 64),
  ("v6e:8x8", 4),
  ("v5p:2x2x1", 4),
  ("v5p:4x4x4", 4),
  ("v5p:4x4x4", 16),
  ("v5p:4x4x4", 64),
  ("v5p:4x4x12", 6),
]


@dataclasses.dataclass(eq=False)
class Chip:
  """Knows where it is."""

  coords: tuple[int, int, int]
  slice_index: int
  platform: str = "tpu"


def chips_of(topology, num_slices=1):
  """Chips of a slice that is not there."""
  sides = (*map(int, topology.partition(":")[2].split("x")), 1)[:3]
  return [Chip(place, index) for index in range(num_slices) for place in np.ndindex(*sides)]


def links_between(mesh):
  """Links of each hop of each ring, the one from its end to its beginning included."""
  rings = np.moveaxis(mesh.devices, 2, -1)
  places = np.array([[chip.coords for chip in ring] for ring in rings.reshape(-1, rings.shape[-1])])
  return np.abs(places - np.roll(places, 1, axis=1)).sum(axis=-1)


@pytest.mark.parametrize("topology, ring", RINGS)
def test_every_hop_of_a_ring_is_one_link_and_the_last_closes_it(topology, ring):
  chips = chips_of(topology)
  mesh = make_mesh(MeshConfig(sequence=ring), chips[::-1])
  assert mesh.devices.shape == (1, len(chips) // ring, ring, 1)
  assert (links_between(mesh) == 1).all()
  assert {id(chip) for chip in mesh.devices.flat} == {id(chip) for chip in chips}


def test_data_and_fsdp_share_out_the_rings():
  chips = chips_of("v5e:4x4", num_slices=2)
  mesh = make_mesh(MeshConfig(data=4, fsdp=2, sequence=4, num_slices=2), chips)
  assert mesh.devices.shape == (4, 2, 4, 1) and (links_between(mesh) == 1).all()
  slices = [{chip.slice_index for chip in rows.flat} for rows in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
  "sizes, topology",
  [
    ({"sequence": 2, "tensor": 2}, "v5e:4x4"),
    ({"fsdp": -1}, "v5e:4x4"),
    ({"sequence": 3}, "v5p:4x4x12"),  # an odd number of chips has no way back
  ],
)
def test_where_there_is_no_such_ring_jax_arranges_the_chips(monkeypatch, sizes, topology):
  def in_order(shape, chips, **options):
    return np.array(chips).reshape(shape)

  monkeypatch.setattr(mesh_utils, "create_device_mesh", in_order)
  chips = chips_of(topology)
  assert list(make_mesh(MeshConfig(**sizes), chips).devices.flat) == chips


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, ValueError])
def test_chips_that_jax_cannot_arrange_are_refused_in_one_line(monkeypatch, error):
  def fail(*_, **__):
    raise error("no such\nassignment")

  monkeypatch.setattr(mesh_utils, "create_device_mesh", fail)
  with pytest.raises(InputError, match=r"1 x 8 x 1 x 2 cannot .* 16 chips \(no such assignment\);"):
    make_mesh(MeshConfig(tensor=2), chips_of("v5e:4x4"))
