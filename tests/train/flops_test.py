"""The operations of a step: counted by hand, and by XLA in a program without loops."""

import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.flops import step_flops
from videochat_flash_jax.train.program import train_program

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"rows": 1, "tokens_per_row": 128, "clips_per_shard": 2, "tiles_per_shard": 2}
SIZES |= {"mesh.sequence": 1, "model": "tiny", "image_size": 64, "remat": "none"}
SIZES |= {"compute_dtype": "float32"}


def settings_of(stage, **changes):
  """The settings of a stage, with a model in which products of matrices dominate."""
  sizes = [f"--config.{name}={size}" for name, size in (SIZES | changes).items()]
  settings = train_settings(read_config(CONFIGS / stage, sizes))
  model = settings.model
  decoder = dataclasses.replace(model.decoder, width=256, head_size=64, mlp_width=768, depth=2)
  vision = dataclasses.replace(model.vision, width=192, mlp_width=768, depth=2)
  model = dataclasses.replace(model, decoder=decoder, vision=vision)
  return dataclasses.replace(settings, model=model)


@pytest.mark.parametrize(
  "stage",
  [
    pytest.param("stage1_align.py", marks=pytest.mark.slow),
    "stage3_long.py",
    pytest.param("stage4_highres.py", marks=pytest.mark.slow),
  ],
)
def test_the_number_of_operations_is_that_counted_by_xla(stage, monkeypatch):
  monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
  settings = settings_of(stage)
  program = train_program(settings, jax.devices()[:1])
  counted = program.step.lower(program.state, program.batch).cost_analysis()["flops"]
  assert step_flops(settings, 1) == pytest.approx(counted, rel=0.1)


def test_operations_grow_with_rows_clips_and_trained_parts():
  settings = settings_of("stage3_long.py")
  twice = dataclasses.replace(settings, rows=2)
  assert step_flops(twice, 1) == 2 * step_flops(settings, 1)
  more_clips = dataclasses.replace(settings, clips_per_shard=4)
  assert step_flops(settings, 1) < step_flops(more_clips, 1)
  optimizer = dataclasses.replace(settings.optimizer, scales=(("lora_", 1.0), ("", 0.0)))
  adapted = dataclasses.replace(settings, optimizer=optimizer)
  frozen = step_flops(adapted, 1)
  with_adapters = dataclasses.replace(adapted, lora=dataclasses.replace(adapted.lora, rank=4))
  assert frozen < step_flops(with_adapters, 1) < step_flops(settings, 1)


@pytest.mark.slow
def test_with_stored_features_the_encoder_has_no_operations(monkeypatch):
  monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
  ours, counted = [], []
  for features in ("", "somewhere"):
    settings = settings_of("stage1_align.py", **{"data.features": features})
    program = train_program(settings, jax.devices()[:1])
    ours.append(step_flops(settings, 1))
    counted.append(program.step.lower(program.state, program.batch).cost_analysis()["flops"])
  assert ours[0] - ours[1] == pytest.approx(counted[0] - counted[1], rel=0.1)
