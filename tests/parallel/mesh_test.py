import types

import jax
import pytest

from tests.fake_devices import fake_devices
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh import CPU_FLAGS, make_mesh
from videochat_flash_jax.parallel.mesh_config import AXES, MeshConfig


def tpus(num_slices, per_slice):
  return [
    types.SimpleNamespace(platform="tpu", slice_index=slice_index)
    for slice_index in range(num_slices)
    for _ in range(per_slice)
  ]


@pytest.mark.parametrize(
  "sizes, devices, message",
  [
    ({"data": 1, "num_slices": 1}, tpus(2, 4), "num_slices is 1, but the 8 devices are in 2: set"),
    ({"data": 4, "num_slices": 4}, tpus(2, 4), "num_slices is 4, but the 8 devices are in 2: set"),
    (
      {"data": 2, "num_slices": 2},
      [types.SimpleNamespace(platform="cpu")] * 8,
      "num_slices is 2, but the 8 devices are in 1: set mesh.num_slices to 1",
    ),
  ],
)
def test_slices_that_are_not_there_are_refused_with_how_many_there_are(sizes, devices, message):
  with pytest.raises(InputError, match=message):
    make_mesh(MeshConfig(**sizes), devices)


def test_one_device_makes_a_mesh_of_ones():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert dict(mesh.shape) == dict.fromkeys(AXES, 1)


@pytest.fixture
def set_option():
  before = {}

  def set_to(name, value):
    before.setdefault(name, getattr(jax.config, name))
    jax.config.update(name, value)

  yield set_to
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize("lacking", [None, *CPU_FLAGS])
@pytest.mark.parametrize("cached", [False, True])
def test_several_devices_of_a_cpu_without_their_settings_are_warned_of(
  lacking, cached, set_option, monkeypatch, caplog
):
  flags = fake_devices(4)["XLA_FLAGS"].split()
  monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if flag != lacking))
  set_option("jax_compilation_cache_dir", "cache")
  set_option("jax_enable_compilation_cache", cached)
  make_mesh(MeshConfig(), jax.devices("cpu") * 4)
  assert len(caplog.records) == (cached or lacking is not None)
  for record in caplog.records:
    assert " ".join(CPU_FLAGS) in record.getMessage()
