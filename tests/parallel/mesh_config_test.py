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
def test_an_axis_of_minus_one_gets_the_remaining_devices(sizes, num_devices, shape):
  assert mesh_shape(MeshConfig(**sizes), num_devices) == shape


@pytest.mark.parametrize(
  "sizes, message",
  [
    (
      {"fsdp": 3},
      "fsdp 3 .* do not multiply to the 8 devices; change a size, or set one axis to -1$",
    ),
    ({"sequence": 3}, "fsdp -1 x sequence 3 .* do not multiply to the 8 devices; change a size$"),
    ({"data": -1}, "data and fsdp are -1: set all but one"),
    ({"tensor": 0}, "mesh.tensor is 0: give a positive number"),
    ({"tensor": -2}, "mesh.tensor is -2: give a positive number, or -1 for the remaining devices"),
    ({"sequence": True}, "mesh.sequence is True: give a positive number"),
    ({"num_slices": 1.0}, "mesh.num_slices is 1.0: give a positive integer"),
    ({"data": 2, "num_slices": 4}, "mesh.num_slices is 4, but mesh.data is 2"),
  ],
)
def test_an_axis_size_that_does_not_fit_is_named_in_the_error(sizes, message):
  with pytest.raises(InputError, match=message) as caught:
    mesh_shape(MeshConfig(**sizes), 8)
  assert "\n" not in str(caught.value)
