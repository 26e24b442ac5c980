"""The stages' configs: typed, checked, and the shapes of their steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.program import train_program
from videochat_flash_jax.train.settings import train_settings

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(path.name for path in CONFIGS.glob("stage*.py"))
ONE_DEVICE = ["--config.mesh.sequence=1", "--config.rows=1"]


def settings_of(stage, *overrides):
  overrides = [f"--config.{override}" for override in overrides]
  return train_settings(read_config(CONFIGS / stage, overrides))


def test_every_stage_is_there():
  assert [name[:6] for name in STAGES] == ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
  "stage, trained, size, frames, rate, tokens",
  [
    ("stage1_align.py", {"connector"}, 224, (4, 4), 1e-3, 8192),
    ("stage2_pretrain.py", {"vision", "connector", "decoder"}, 224, (4, 8), 1e-5, 32768),
    ("stage3_long.py", {"vision", "connector", "decoder"}, 224, (64, 512), 1e-5, 32768),
    ("stage4_highres.py", {"vision", "connector"}, 448, (64, 512), 1e-5, 32768),
  ],
)
def test_stages_are_as_published(stage, trained, size, frames, rate, tokens):
  settings = settings_of(stage)
  assert set(settings.trained) == trained and settings.frames == frames
  assert settings.learning_rate == rate and settings.vision_learning_rate == 2e-6
  assert settings.tokens_per_row == tokens and settings.model.vision.image_size == size


@pytest.mark.parametrize(
  "stage",
  [
    # The others have the same program, or nearly so.
    pytest.param(name, marks=() if name[:6] in ("stage1", "stage3") else pytest.mark.slow)
    for name in STAGES
  ],
)
def test_two_steps_of_a_stage_have_shapes(stage):
  settings = train_settings(read_config(CONFIGS / stage, ONE_DEVICE))
  program = train_program(settings, jax.devices()[:1])

  def two_steps(state, batch):
    state, _ = program.step(state, batch)
    return program.step(state, batch)

  state, metrics = jax.eval_shape(two_steps, program.state, program.batch)
  assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
  for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
    assert new.shape == old.shape and new.dtype == old.dtype


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_has_no_optimizer_state_and_is_in_bfloat16(stage):
  settings = train_settings(read_config(CONFIGS / stage, ONE_DEVICE))
  state = train_program(settings, jax.devices()[:1]).state
  assert set(state.trained) == set(settings.trained)
  assert {x.dtype for x in jax.tree.leaves(state.frozen)} <= {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
  sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in (state.trained, state.optimizer)]
  assert 0 <= sizes[1] - 2 * sizes[0] < 8  # two moments of each weight, and counters


@pytest.mark.parametrize(
  "override, complaint",
  [
    ("model=qwen3", r"config\.model is 'qwen3': give one of tiny, qwen2_7b_res224"),
    ("image_size=100", r"image_size is 100: give pixels, a multiple of 16"),
    ("trained=('visoin',)", r"config\.trained is \('visoin',\): give names out of"),
    ("sequence_parallel=rign", r"sequence_parallel is 'rign': give none or all_gather or ring"),
    ("rows=0", r"rows is 0: give a positive integer"),
    ("frames=(8, 4)", r"frames is \(8, 4\): give the least and the most"),
    ("learning_rate=-1.0", r"learning_rate is -1\.0: give a positive number"),
    ("mesh.sequnce=4", r"no field 'mesh\.sequnce': did you mean mesh\.sequence"),
    ("mesh.tensor=x", r"mesh\.tensor=x: the field holds a int"),
  ],
)
def test_a_wrong_field_is_named_with_the_remedy(override, complaint):
  with pytest.raises(InputError, match=complaint):
    settings_of("stage3_long.py", override)


@pytest.mark.parametrize(
  "overrides, complaint",
  [
    (["mesh.sequence=4"], "do not make the 1 devices"),
    (["mesh.sequence=0"], r"mesh\.sequence is 0"),
    (["mesh.sequence=1", "mesh.fsdp=2"], "do not make the 1 devices"),
    (["mesh.sequence=2", "mesh.fsdp=2"], "fsdp 2 x sequence 2 x tensor 1 do not make"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_built(overrides, complaint):
  with pytest.raises(InputError, match=complaint):
    train_program(settings_of("stage3_long.py", *overrides), jax.devices()[:1])
