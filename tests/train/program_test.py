"""Programs of configs: the shapes of their steps at real sizes, and their first states."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small_models import CONFIG
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.train.config import run_configs, train_settings
from videochat_flash_jax.train.dropout_plans import with_plan
from videochat_flash_jax.train.program import train_program

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.py") if path.stem not in ("common", "tiny"))
ONE_DEVICE = ("mesh.sequence=1", "rows=1")
TINY = (*ONE_DEVICE, "model=tiny", "image_size=32", "tokens_per_row=96", "clips_per_shard=2")
TINY = (*TINY, "tiles_per_shard=0", "compute_dtype=float32", "num_steps=10", "seed=3")
TRAINED = {
  "finetune.py": {"connector", "decoder"},
  "stage1_align.py": {"connector"},
  "stage2_pretrain.py": {"vision", "connector", "decoder"},
  "stage3_long.py": {"vision", "connector", "decoder"},
  "stage4_highres.py": {"vision", "connector"},
}
ANSWERS = {"answer_tokens"}
STAGES_OF_TINY = {
  "stage0_encoder": ({"vision", "heads"}, {"kinds", "colours"}),
  "stage1_align": ({"connector"}, ANSWERS),
  "stage2_pretrain": ({"connector", "decoder"}, ANSWERS),
  "stage3_long": ({"connector", "decoder"}, ANSWERS),
  "stage4_highres": ({"vision", "connector"}, ANSWERS),
}


def settings_of(name, *overrides):
  return train_settings(read_config(CONFIGS / name, [f"--config.{x}" for x in overrides]))


def program_of(name, *overrides):
  return train_program(settings_of(name, *overrides), jax.devices()[:1])


def small_program(name, *overrides, **changes):
  """The program of a config with a model that compiles quickly."""
  settings = dataclasses.replace(settings_of(name, *TINY, *overrides), model=CONFIG, **changes)
  return train_program(settings, jax.devices()[:1])


def assert_two_steps_have_shapes(program):
  """A step takes the state that a step returns. Returns the shapes of the second step's metrics."""

  def two_steps(state, batch):
    state, _ = program.step(state, batch)
    return program.step(state, batch)

  new, metrics = jax.eval_shape(two_steps, program.state, program.batch)
  assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
  assert metrics.keys() >= {"targets", "grad_norm"}
  for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(program.state), strict=True):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
  return metrics


@pytest.mark.parametrize("stage", STAGES_OF_TINY)
def test_two_steps_of_each_stage_of_the_tiny_config_have_shapes(stage):
  config = run_configs(read_config(CONFIGS / "tiny.py", []))[stage]
  program = train_program(train_settings(config), jax.devices()[:1])
  trained, metrics = STAGES_OF_TINY[stage]
  assert set(program.state.trained) == trained
  assert set(assert_two_steps_have_shapes(program)) == {"loss", "targets", "grad_norm", *metrics}


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name == "stage3_long.py" else pytest.mark.slow) for name in RUNS],
)
def test_two_steps_of_a_config_have_shapes_and_frozen_weights_have_no_optimizer_state(name):
  program = program_of(name, *ONE_DEVICE)
  state = program.state
  assert set(state.trained) == TRAINED[name]
  assert {x.dtype for x in jax.tree.leaves(state.frozen)} <= {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
  sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in (state.trained, state.optimizer)]
  assert 0 <= sizes[1] - 2 * sizes[0] < 8  # two moments of each weight, and counters
  metrics = assert_two_steps_have_shapes(program)
  assert set(metrics) == {"loss", "answer_tokens", "targets", "grad_norm"}


def test_the_optimizer_state_of_stage_1_is_that_of_the_projector_alone():
  program = program_of("stage1_align.py", *ONE_DEVICE)
  own = sum(x.size * 4 for name, x in program.weights.items() if name.startswith("connector."))
  moments = [x for x in jax.tree.leaves(program.state.optimizer) if x.ndim]
  assert sum(x.size * x.dtype.itemsize for x in moments) == 2 * own == 2 * 16_522_240 * 4


def test_only_the_adapters_of_an_adapted_decoder_are_trained():
  program = program_of("finetune.py", *ONE_DEVICE)
  layers = program.state.trained["decoder"]["layers"]["stacked"]
  assert set(layers) == {"q_proj", "k_proj", "v_proj", "o_proj"}
  assert all(set(weights) == {"lora_a", "lora_b"} for weights in layers.values())
  assert not any("lora" in path for path in program.weights)


def filled(shapes):
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items() if name != "dropout"}
  batch["frames"] = rng.integers(0, 255, batch["frames"].shape, np.uint8)
  batch["token_ids"] = rng.integers(5, 40, batch["token_ids"].shape).astype(np.int32)
  visual = np.arange(96) - 2
  visual_index = np.where((visual >= 0) & (visual < 12), visual, -1)
  batch["visual_index"] = visual_index[None].astype(np.int32)
  batch["labels"] = np.where(np.arange(96) >= 80, batch["token_ids"], -100).astype(np.int32)
  batch["positions"] = np.arange(96, dtype=np.int32)[None]
  batch["segment_ids"] = np.ones((1, 96), np.int32)
  return batch


def test_the_first_state_holds_the_given_weights_and_random_adapters():
  program = small_program("finetune.py")
  given = {path: np.full(shape.shape, 0.01, np.float32) for path, shape in program.weights.items()}
  state = program.begin(given)
  jax.tree.map(lambda x, shape: x.shape == shape.shape or 1 / 0, state, program.state)
  assert float(state.frozen["vision"]["norm"]["scale"][0]) == pytest.approx(0.01)
  adapter = state.trained["decoder"]["layers"]["stacked"]["q_proj"]
  assert np.ptp(adapter["lora_a"]) > 0 and not adapter["lora_b"].any()
  assert not any(x.any() for x in jax.tree.leaves(state.optimizer))
  with pytest.raises(InputError, match=r"connector\.fc1\.bias is missing; give an init_from"):
    program.begin({path: x for path, x in given.items() if path != "connector.fc1.bias"})
  given["connector.fc1.bias"] = np.zeros(7)
  with pytest.raises(InputError, match=r"connector\.fc1\.bias is \(7,\), but this model's is"):
    program.begin(given)


@pytest.mark.slow
def test_steps_with_dropout_lower_the_loss_and_frozen_weights_do_not_change_by_a_bit():
  dropout = DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.75, 0.25))
  rates = ("optimizer.scales=(('connector', 1.0), ('', 0.0))", "optimizer.learning_rate=0.01")
  program = small_program("stage3_long.py", *rates, dropout=dropout)
  batch = with_plan(filled(program.batch), dropout, program.layout)
  for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(program.batch), strict=True):
    assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
  batch = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch, program.batch)
  state, losses = program.begin(None), []
  frozen = jax.tree.map(np.asarray, state.frozen)
  with jax.transfer_guard("disallow"):
    for _ in range(5):
      state, metrics = program.step(state, batch)
      losses.append(metrics["loss"])
  assert losses[-1] < losses[1]
  jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


@pytest.mark.slow
def test_adapters_are_trained_at_the_full_rate_the_connector_at_a_tenth_and_the_rest_is_frozen():
  program = small_program("finetune.py", "optimizer.warm_up=0.0", "num_steps=20")
  batch = jax.device_put(filled(program.batch), jax.tree.map(lambda x: x.sharding, program.batch))
  state = program.begin(None)
  first, moved = jax.tree.map(np.asarray, state), []
  for _ in range(20):
    before, (state, _) = jax.tree.map(np.asarray, state.trained), program.step(state, batch)
    moved.append(jax.tree.map(lambda new, old: np.abs(new - old).max(), state.trained, before))
  jax.tree.map(np.testing.assert_array_equal, state.frozen, first.frozen)
  steps = moved[0]  # the first updates of AdamW are as large as the rate
  adapters = [weight["lora_b"] for weight in steps["decoder"]["layers"]["stacked"].values()]
  np.testing.assert_allclose(adapters, 1e-4, rtol=0.02)
  np.testing.assert_allclose(jax.tree.leaves(steps["connector"]), 1e-5, rtol=0.02)
  total = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.trained, first.trained)
  assert len(adapters) == 4 and all(size > 0 for size in jax.tree.leaves(total))


@pytest.mark.parametrize(
  "overrides, complaint",
  [
    (["mesh.sequence=4"], "do not multiply to the 1 devices"),
    (["mesh.sequence=0"], r"mesh\.sequence is 0"),
    (["mesh.sequence=1", "mesh.fsdp=2"], "do not multiply to the 1 devices"),
    (["mesh.sequence=2", "mesh.fsdp=2"], "fsdp 2 x sequence 2 x tensor 1 do not multiply to"),
    (
      [*ONE_DEVICE, "optimizer.scales=(('visoin', 1.0), ('', 0.0))"],
      "'visoin' is not the first match of any weight",
    ),
    (
      [*ONE_DEVICE, "optimizer.scales=(('lora_', 1.0), ('', 0.0))"],
      "'lora_' is not the first match of any weight",
    ),
  ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(overrides, complaint):
  with pytest.raises(InputError, match=complaint):
    program_of("stage3_long.py", *overrides)
