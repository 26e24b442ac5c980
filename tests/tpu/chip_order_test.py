"""Rings on slices as the TPU's own library describes them (`make test-tpu`)."""

import pytest

from tests.parallel.chip_order_test import RINGS, links_between
from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize("topology, ring", RINGS)
def test_every_hop_of_a_ring_is_one_link_and_the_last_closes_it(topology, ring):
  mesh = make_mesh(MeshConfig(sequence=ring), ahead_of_time.topology_devices(topology))
  assert (links_between(mesh) == 1).all() and len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.parametrize("topology", ["v5p:4x4x28", "v5e:16x16", "v4:2x2x4"])
def test_slices_without_rings_are_arranged_by_jax(topology):
  mesh = make_mesh(MeshConfig(), ahead_of_time.topology_devices(topology))
  assert len(set(mesh.devices.flat)) == mesh.size
