"""A config's step on eight devices: what it refuses, and that it runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.program import train_program
from videochat_flash_jax.train.settings import train_settings

STAGE_3 = Path(__file__).parents[2] / "configs" / "stage3_long.py"


def program_of(*overrides):
  overrides = [f"--config.{override}" for override in overrides]
  return train_program(train_settings(read_config(STAGE_3, overrides)), jax.devices())


@pytest.mark.parametrize(
  "overrides, complaint",
  [
    (["rows=3"], r"rows: 3 is no multiple of 2, which is mesh\.data x mesh\.fsdp"),
    (
      ["tokens_per_row=32772"],
      r"32772 is no multiple of 8, which is 2 x mesh\.sequence, .* zigzag",
    ),
    (
      ["tokens_per_row=32770", "zigzag=False"],
      r"32770 is no multiple of 4, which is mesh\.sequence",
    ),
    (["sequence_parallel=none"], r"sequence_parallel is 'none', but mesh\.sequence is 4: choose"),
    (["mesh.sequence=3"], r"sequence 3 x tensor 1 do not make the 8 devices"),
    (["mesh.sequence=1", "mesh.tensor=8"], r"model: 28 is no multiple of 8, .* heads"),
    (["mesh.tensor=2", "clips_per_shard=3"], r"clips_per_shard: 3 is no multiple of 2"),
    (["accumulate=16"], r"rows: 16 is no multiple of 32, .* x mesh\.fsdp x accumulate"),
    (["model=tiny", "image_size=32", "mesh.tensor=2", "mesh.sequence=1"], None),
    (
      ["model=tiny", "image_size=32", "mesh.tensor=2", "mesh.sequence=1", "sequence_parallel=none"],
      None,
    ),
  ],
)
def test_sizes_that_cannot_be_split_are_refused_in_one_line(overrides, complaint):
  if complaint is None:
    assert program_of(*overrides).batch["frames"].shape[:2] == (16, 128)
    return
  with pytest.raises(InputError, match=complaint) as error:
    program_of(*overrides)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows, accumulate", [(2, 1), (4, 2)])
def test_the_step_of_a_config_trains(rows, accumulate):
  tiny = ["model=tiny", "image_size=32", "tokens_per_row=64", "clips_per_shard=1"]
  tiny += [f"rows={rows}", f"accumulate={accumulate}"]
  program = program_of(*tiny, "optimizer.learning_rate=0.1", "num_steps=40")
  compiled = program.step.lower(program.state, program.batch).compile()
  assert program_costs(compiled.as_text()).counts["collective-permute"] > 0

  rng = np.random.default_rng(0)

  def filled(shape):
    small = rng.normal(0, 0.05, shape.shape) if shape.dtype == jnp.float32 else 0
    return jax.device_put(np.broadcast_to(small, shape.shape).astype(shape.dtype), shape.sharding)

  state, batch = jax.tree.map(filled, (program.state, program.batch))
  state = state._replace(optimizer=jax.tree.map(jnp.zeros_like, state.optimizer))
  tokens = program.batch["labels"].sharding
  batch["labels"] = jax.device_put(np.full((rows, 64), 5, np.int32), tokens)
  batch["segment_ids"] = jax.device_put(np.ones((rows, 64), np.int32), tokens)
  losses = []
  for _ in range(6):
    state, metrics = compiled(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0], losses
