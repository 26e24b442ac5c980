import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh_config import MeshConfig, mesh_shape


@pytest.mark.parametrize(
  "sizes, num_devices, shape",
  [
    ({}, 8, (1, 8, 1, 1)),
    ({"sequence": 4}, 8, (1, 2, 4, 1)),
    ({"data": 2, "sequence": 2, "tensor": 2}, 8, (2, 1, 2, 2)),
    ({"fsdp": 1, "sequence": -1}, 6, (1, 1, 6, 1)),
    ({"data": 4, "num_slices": 2}, 16, (4, 4, 1, 1)),
  ],
)
def test_a_free_axis_takes_the_devices_that_are_left(sizes, num_devices, shape):
  assert mesh_shape(MeshConfig(**sizes), num_devices) == shape


@pytest.mark.parametrize(
  "sizes, said",
  [
    ({"fsdp": 3}, "fsdp 3 .* do not make the 8 devices; change a size, or give -1 to one axis$"),
    ({"sequence": 3}, "fsdp -1 x sequence 3 .* do not make the 8 devices; change a size$"),
    ({"data": -1}, "data and fsdp are -1: leave only one"),
    ({"tensor": 0}, "mesh.tensor is 0: give a positive number"),
    ({"data": 2, "num_slices": 4}, "mesh.num_slices is 4, but mesh.data is 2"),
  ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, said):
  with pytest.raises(InputError, match=said) as caught:
    mesh_shape(MeshConfig(**sizes), 8)
  assert "\n" not in str(caught.value)
