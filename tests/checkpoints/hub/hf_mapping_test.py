"""The two names of InternVideo2's LayerScale; all other names are in released_sizes_test.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.small_models import CONFIG, fill_randomly
from videochat_flash_jax.checkpoints.convert import flat_weights, load_model, save_model
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

CONFIG = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, kind="internvideo2"))
BLOCK = "model.vision_tower.vision_tower.blocks.1"


def make_model(config):
  return VideoChatFlash(config, rngs=nnx.Rngs(0))


@pytest.fixture
def checkpoint(tmp_path):
  """A directory that holds a small model with InternVideo2."""
  save_model(fill_randomly(lambda: make_model(CONFIG)), CONFIG, tmp_path)
  return tmp_path


def edit_weights(directory, edit):
  tensors = edit(load_file(directory / "model.safetensors"))
  save_file(tensors, directory / "model.safetensors")


def weight_names(tensors):
  return {name.replace(".gamma", ".weight"): tensor for name, tensor in tensors.items()}


def test_layer_scales_are_written_as_gamma(checkpoint):
  names = load_file(checkpoint / "model.safetensors").keys()
  scales = {name for name in names if ".ls" in name}
  blocks = BLOCK.removesuffix("1")
  assert scales == {f"{blocks}{layer}.ls{part}.gamma" for layer in (0, 1) for part in (1, 2)}


def test_tensors_stand_as_the_original_lays_them_out(checkpoint):
  tensors = load_file(checkpoint / "model.safetensors")
  tower = "model.vision_tower.vision_tower"
  vision, grid = CONFIG.vision, CONFIG.vision.grid_size
  patches = grid * grid
  assert tensors[f"{tower}.cls_token"].shape == (1, 1, vision.width)
  assert tensors[f"{tower}.pos_embed"].shape == (1, 1 + 4 * patches, vision.width)
  assert tensors[f"{tower}.img_pos_embed"].shape == (1, 1 + patches, vision.width)


@pytest.mark.parametrize("rename", [weight_names, dict], ids=["weight", "gamma"])
def test_layer_scales_are_read_under_either_name(checkpoint, rename):
  edit_weights(checkpoint, rename)
  loaded = load_model(make_model, checkpoint)
  expected = dict(flat_weights(nnx.state(fill_randomly(lambda: make_model(CONFIG)))))
  for path, array in flat_weights(nnx.state(loaded)):
    assert np.asarray(array).tobytes() == np.asarray(expected.pop(path)).tobytes(), path
  assert not expected


def test_a_layer_scale_under_both_names_is_refused(checkpoint):
  name = f"{BLOCK}.ls2"
  edit_weights(checkpoint, lambda t: t | {f"{name}.weight": np.array(t[f"{name}.gamma"])})
  with pytest.raises(InputError, match=rf"unexpected: {name}\.weight;"):
    load_model(make_model, checkpoint)


def test_a_layer_scale_under_no_name_is_missing(checkpoint):
  name = f"{BLOCK}.ls1.gamma"
  edit_weights(checkpoint, lambda t: {key: tensor for key, tensor in t.items() if key != name})
  with pytest.raises(InputError, match=rf"missing: {name};"):
    load_model(make_model, checkpoint)


def test_names_of_the_other_encoder_are_unexpected(checkpoint):
  tower = "model.vision_tower.vision_tower."
  edit_weights(
    checkpoint,
    lambda t: {name.replace(tower, f"{tower}encoder."): tensor for name, tensor in t.items()},
  )
  with pytest.raises(InputError, match=rf"missing: {tower}.*unexpected: {tower}encoder\."):
    load_model(make_model, checkpoint)


def test_a_model_in_bfloat16_goes_out_and_comes_in_byte_for_byte(tmp_path):
  model = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  save_model(model, CONFIG, tmp_path / "small")
  loaded = load_model(make_model, tmp_path / "small", jnp.bfloat16)
  assert loaded.config == dataclasses.replace(CONFIG, name="small")
  save_model(loaded, loaded.config, tmp_path / "again")
  again = (tmp_path / "again" / "model.safetensors").read_bytes()
  assert again == (tmp_path / "small" / "model.safetensors").read_bytes()
