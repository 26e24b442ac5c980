"""What `vcflash fit` adds up, beside what the TPU's compiler takes for the real programs."""

import dataclasses

import pytest

from videochat_flash_jax.inference.fitting import Fitting, Setting
from videochat_flash_jax.inference.program_shapes import (
  decode_program,
  encode_program,
  prefill_program,
)
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.parallel.chips import CHIPS
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu

PRESET = DropoutConfig.model_card()
FRAMES = 10_000
CONFIG = VideoChatFlashConfig.qwen2_7b_res448()
SIZES = {"num_tokens": 160_032, "num_visual": 160_000, "weights": "int8"}


def memory_of(program, arguments):
  return program.lower(*arguments).compile().memory_analysis()


@pytest.fixture(scope="module")
def mesh():
  from jax.experimental import topologies

  options = {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
  return make_mesh(MeshConfig(), topologies.get_topology_desc(**options).devices)


@pytest.fixture(scope="module")
def encoding(mesh):
  """Temporary bytes of encoding a group of clips, which runs beside the other programs."""
  return memory_of(*encode_program(CONFIG, mesh)).temp_size_in_bytes


@pytest.mark.parametrize("cache, dropout", [("int8", None), ("int8", PRESET), ("int4", PRESET)])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_ten_thousand_frames_fit_on_a_v5e_and_need_what_was_added_up(
  mesh, encoding, name, cache, dropout
):
  config = dataclasses.replace(CONFIG, dropout=dropout)
  sizes = SIZES | {"cache": cache}
  absent = 0
  if name == "decode":
    memory = memory_of(*decode_program(config, mesh, rows=1, max_new_tokens=256, **sizes))
    absent = Fitting(CONFIG).weights_of("vision", "connector")  # not among its arguments
  else:
    memory = memory_of(*prefill_program(config, mesh, **sizes))
  needs = Fitting(CONFIG).needs(FRAMES, Setting("int8", cache, dropout))
  taken = memory.peak_memory_in_bytes + absent + encoding
  assert taken <= needs.total <= CHIPS["v5e"].memory_bytes
  assert needs.total <= 1.1 * taken
  held = needs.weights + needs.cache - absent
  assert abs(memory.argument_size_in_bytes / held - 1) < 0.03
