"""Runs on a mixture of videos and text, with pixels or with stored features."""

import json

import numpy as np
import pytest

from tests.data.batches.small_mixture import read_rows, write_mixture
from tests.train import small_config
from tests.train.small_runs import losses, records
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import loop


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  path = write_mixture(tmp_path_factory.mktemp("mixture"), num_videos=4, num_images=0, num_texts=4)
  read_rows(path)
  return path


@pytest.fixture(scope="module")
def features(mixture, tmp_path_factory):
  path = tmp_path_factory.mktemp("features") / "of_tiny"
  encode = ["data", "encode", str(mixture), "--model", "tiny", "--out", str(path)]
  assert main([*encode, "--frames", "4", "16"]) in (0, None)
  return path


def run_config(mixture, **changes):
  """Four steps of the embedded model on a mixture, its encoder frozen."""
  config = small_config.get_config()
  config.init_from, config.num_steps, config.log_every = "tiny", 4, 2
  config.tokens_per_row, config.clips_per_shard, config.tiles_per_shard = 192, 6, 0
  config.data.synthetic = type(config)()
  config.data.mixture, config.data.frames = str(mixture), (4, 16)
  config.optimizer.scales = (("vision", 0.0), ("", 1.0))
  config.checkpoint.every = 100
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


@pytest.fixture(scope="module")
def with_pixels(mixture, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pixels")
  loop.train(run_config(mixture, eval__mixture=str(mixture)), workdir)
  return workdir


def lines(workdir):
  return [record for record in records(workdir) if "loss" in record]


def test_a_line_of_the_log_describes_the_data_of_its_own_steps(with_pixels):
  first, last = lines(with_pixels)
  saved = json.loads((with_pixels / "checkpoints" / "4" / "data" / "metadata").read_text())
  stream = saved["streams"]["0"]
  assert 2 * (first["examples_per_step"] + last["examples_per_step"]) == stream["examples"] > 0
  for line in (first, last):
    assert 0 < line["data/tokens_filled"] <= 1 and line["data/broken_share"] == 0
    assert 0 <= line["data_wait"] <= 1 and line["visual_tokens_per_second"] > 0
  assert [record["step"] for record in records(with_pixels) if "eval/loss" in record] == [4]


def test_the_compile_time_before_the_first_step_is_logged_apart_from_the_steps(with_pixels):
  start, first, *_ = records(with_pixels)
  assert start["event"] == "start" and start["compile_seconds"] > 0
  assert first["wall_seconds"] - start["wall_seconds"] >= 0


@pytest.mark.slow
def test_training_on_stored_features_gives_the_losses_of_training_on_pixels(
  mixture, features, with_pixels, tmp_path
):
  config = run_config(mixture, eval__mixture=str(mixture), data__features=str(features))
  loop.train(config, tmp_path)
  # Features are rounded to bfloat16.
  np.testing.assert_allclose(losses(tmp_path), losses(with_pixels), rtol=0.01)
  evaluated, expected = (
    [record["eval/loss"] for record in records(workdir) if "eval/loss" in record]
    for workdir in (tmp_path, with_pixels)
  )
  np.testing.assert_allclose(evaluated, expected, rtol=0.01)
  pixels, stored = lines(with_pixels)[-1], lines(tmp_path)[-1]
  assert pixels["examples_per_step"] == stored["examples_per_step"]


def test_features_of_another_encoder_are_refused(mixture, features, tmp_path):
  damaged = tmp_path / "others"
  damaged.mkdir()
  key = json.loads((features / "key.json").read_text())
  (damaged / "key.json").write_text(json.dumps(key | {"weights": "0" * 64}))
  with pytest.raises(InputError, match="features of another encoder: weights is '000") as error:
    loop.train(run_config(mixture, data__features=str(damaged)), tmp_path / "run")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "scales", [(("", 1.0),), (("vision.*bias", 1.0), ("vision", 0.0), ("", 1.0))]
)
def test_features_of_an_encoder_that_is_trained_are_refused(mixture, features, tmp_path, scales):
  config = run_config(mixture, data__features=str(features))
  config.optimizer.scales = scales
  with pytest.raises(InputError, match=r"data\.features .* but the encoder is trained") as error:
    loop.train(config, tmp_path / "run")
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_features_of_the_synthetic_world_are_refused(mixture, tmp_path):
  config = run_config(mixture, data__features="somewhere")
  config.data.synthetic = small_config.get_config().data.synthetic
  with pytest.raises(InputError, match=r"all examples come from data\.synthetic"):
    loop.train(config, tmp_path / "run")
