"""A config's step on eight devices: what it refuses, and that it runs."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.linalg import norm

from tests.conftest import assert_close
from tests.data.batches.sharded_batch import shard_rows
from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.program import train_program

STAGE_3 = Path(__file__).parents[2] / "configs" / "stage3_long.py"
STAGE_1 = STAGE_3.with_name("stage1_align.py")


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
    (["mesh.sequence=3"], r"sequence 3 x tensor 1 do not multiply to the 8 devices"),
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


@pytest.mark.slow
@pytest.mark.parametrize("rows, accumulate", [(2, 1), (4, 2)])
def test_the_step_of_a_config_lowers_the_loss(rows, accumulate):
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


@pytest.mark.slow
def test_a_production_step_on_a_mesh_equals_one_on_one_device():
  """Frozen parts and shardings as a run has them; in bfloat16, no farther from float32."""
  sizes = ["model=tiny", "image_size=32", "rows=2", "tokens_per_row=96", "clips_per_shard=2"]
  sizes += ["tiles_per_shard=0", "sequence_parallel=ring"]
  alone, together = stepped(sizes, 1), stepped([*sizes, "mesh.sequence=4"], 8)
  assert {leaf.dtype for leaf in together.frozen} == {jnp.dtype("bfloat16")}
  for ours, theirs in zip(together.frozen, alone.frozen, strict=True):
    np.testing.assert_array_equal(ours, theirs)

  sizes += ["compute_dtype=float32"]
  exact, exact_together = stepped(sizes, 1), stepped([*sizes, "mesh.sequence=4"], 8)
  assert exact.loss > 1 and exact_together.loss == pytest.approx(exact.loss, rel=1e-5)
  for ours, expected in zip(exact_together.moments, exact.moments, strict=True):
    assert_close(ours, expected, relative=1e-5)
  assert together.loss == pytest.approx(exact.loss, rel=2e-3)
  rounded = zip(together.moments, alone.moments, exact.moments, strict=True)
  for ours, theirs, expected in rounded:
    assert 0 < norm(ours - expected) < 1.5 * norm(theirs - expected) < 0.2 * norm(expected)


class Stepped(NamedTuple):
  loss: float
  moments: list[np.ndarray]
  frozen: list[np.ndarray]


def stepped(overrides, num_devices):
  """The loss of a step of stage 1; behind it, Adam's means of gradients, and what is frozen."""
  settings = train_settings(read_config(STAGE_1, [f"--config.{o}" for o in overrides]))
  program = train_program(settings, jax.devices()[:num_devices])
  rng = np.random.default_rng(0)

  def drawn(path, shape):
    noise = rng.standard_normal(shape.shape)
    name = jax.tree_util.keystr(path)
    scale = shape.shape[-2] ** -0.5 if "kernel" in name or "embedding" in name else 0.2
    return put(scale * noise + ("scale" in name), shape)

  def put(array, shape):
    return jax.device_put(np.asarray(array).astype(shape.dtype), shape.sharding)

  trained, frozen = (jax.tree_util.tree_map_with_path(drawn, part) for part in program.state[:2])
  optimizer = jax.tree.map(lambda shape: put(np.zeros(shape.shape), shape), program.state.optimizer)
  state = program.state._replace(trained=trained, frozen=frozen, optimizer=optimizer)
  batch = shard_rows(
    row_of_two_clips(rng),
    num_shards=settings.mesh.sequence,
    zigzag=settings.mesh.sequence > 1,
    clip_tokens=settings.model.connector.clip_tokens,
    clips_per_shard=settings.clips_per_shard,
  )
  batch = {name: put(batch[name], shape) for name, shape in program.batch.items()}
  state, metrics = program.step(state, batch)
  moments = jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))
  frozen = jax.tree.leaves(state.frozen)
  return Stepped(
    float(metrics["loss"]), list(map(np.asarray, moments)), list(map(np.asarray, frozen))
  )


def row_of_two_clips(rng):
  """Two rows of a few words, two clips, a question and its answer."""
  token_ids = rng.integers(5, 700, (2, 96)).astype(np.int32)
  visual_index = np.full((2, 96), -1, np.int32)
  visual_index[:, 4:52] = np.arange(48)
  labels = np.where(np.arange(96) >= 60, token_ids, IGNORE_LABEL).astype(np.int32)
  return {
    "frames": rng.integers(0, 256, (2, 2, 4, 32, 32, 3)).astype(np.uint8),
    "token_ids": token_ids,
    "labels": labels,
    "visual_index": visual_index,
    "positions": np.broadcast_to(np.arange(96, dtype=np.int32), (2, 96)),
    "segment_ids": np.ones((2, 96), np.int32),
  }
