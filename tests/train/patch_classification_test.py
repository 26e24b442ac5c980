"""The objective "patches": its loss, its batches, and what a run with it cannot use."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import quick_jit
from tests.data.batches.saved_batches import digest
from tests.train.program_test import small_program
from tests.train.run_test import small
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train import patch_classification
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.flops import encoder_flops
from videochat_flash_jax.train.patch_classification import add_heads, clip_batches, patch_loss
from videochat_flash_jax.train.program import train_program

MODEL = VideoChatFlashConfig.tiny()
SIZE = MODEL.vision.image_size


def patch_settings(**changes):
  return train_settings(small(objective="patches", rows=2, clips_per_shard=3, **changes))


@quick_jit
def loss_of(model, batch):
  return patch_loss(model, batch)


def test_the_loss_falls_when_the_heads_are_right():
  model = VideoChatFlash(MODEL, rngs=nnx.Rngs(0))
  add_heads(model, nnx.Rngs(1), {"kinds": 3})
  frames = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3)).astype(np.uint8)
  labels = np.full((2, 64), 1, np.int32)
  labels[0] = 2
  labels[1, ::2] = IGNORE_LABEL
  batch = {"frames": jnp.asarray(frames), "kinds": jnp.asarray(labels)}
  before = loss_of(model, batch).means()
  model.heads["kinds"].bias[...] = jnp.array([-50.0, 0.0, 0.0])
  after = loss_of(model, batch).means()
  assert after["loss"] < before["loss"] and 0 <= after["kinds"] <= 1


def test_clips_with_fewer_patches_than_they_may_have_tokens_are_classified():
  vision = dataclasses.replace(MODEL.vision, image_size=16)  # 16 patches, of at most 24 tokens
  model = VideoChatFlash(dataclasses.replace(MODEL, vision=vision), rngs=nnx.Rngs(0))
  add_heads(model, nnx.Rngs(1), {"kinds": 3})
  batch = {
    "frames": jnp.zeros((1, 4, 16, 16, 3), jnp.uint8),
    "kinds": jnp.ones((1, 16), jnp.int32),
  }
  assert loss_of(model, batch).means()["targets"] == 16


@pytest.mark.slow
def test_the_encoder_alone_learns_to_classify_patches():
  program = small_program(
    "stage3_long.py",
    "objective=patches",
    "optimizer.scales=(('vision|heads', 1.0), ('', 0.0))",
    "optimizer.learning_rate=0.01",
  )
  assert set(program.state.trained) == {"vision", "heads"}
  assert set(program.batch) == {"frames", "kinds", "colours"}
  rng = np.random.default_rng(0)
  batch = {
    name: jax.device_put(rng.integers(0, 8, x.shape).astype(x.dtype), x.sharding)
    for name, x in program.batch.items()
  }
  state, losses = program.begin(None), []
  for _ in range(4):
    state, metrics = program.step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[1] and set(metrics) >= {"kinds", "colours"}


def test_clip_batches_resume_from_a_state_that_is_a_number():
  batches = iter(clip_batches(MODEL, num_videos=2, clips_per_video=3, seed=1))
  first = next(batches)
  num_patches = 4 * MODEL.vision.grid_size**2
  assert first["frames"].shape == (6, 4, SIZE, SIZE, 3)
  assert first["kinds"].shape == first["colours"].shape == (6, num_patches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [digest(next(batches)) for _ in range(2)]
  resumed = iter(clip_batches(MODEL, num_videos=2, clips_per_video=3, seed=1))
  resumed.set_state(state)
  assert [digest(next(resumed)) for _ in range(2)] == expected != [digest(first)] * 2
  assert len(json.dumps(state)) < 100


def test_batches_have_the_shapes_of_the_program_and_held_out_clips_are_others():
  settings = patch_settings()
  program, read = train_program(settings, jax.devices()), []
  for batches in (patch_classification.run_batches, patch_classification.held_out_batches):
    with contextlib.closing(batches(settings, program, Path("no hub")).begin()) as iterator:
      read.append(next(iterator))
  for name, shape in program.batch.items():
    assert all(
      (batch[name].shape, batch[name].dtype) == (shape.shape, shape.dtype) for batch in read
    )
  assert (np.asarray(read[0]["frames"]) != np.asarray(read[1]["frames"])).any()


def test_the_operations_of_a_step_are_those_of_the_encoder_on_each_clip():
  settings = patch_settings()
  assert patch_classification.step_flops(settings, 1) == 6 * encoder_flops(settings, 4) > 0


def test_stored_features_are_refused():
  settings = patch_settings(data__features="somewhere")
  with pytest.raises(InputError, match=r"config\.data\.features is 'somewhere', .* give no"):
    patch_classification.check(settings, train_program(settings, jax.devices()))


def test_several_processes_are_refused(monkeypatch):
  settings = patch_settings()
  program = train_program(settings, jax.devices())
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match=r"config\.objective .* is for one process; start only one"):
    patch_classification.check(settings, program)
