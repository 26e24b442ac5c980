"""A small checkpoint, and ways to bend and to compare it."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_root
from tests.models.small_models import CONFIG, fill_randomly
from videochat_flash_jax.checkpoints.convert import (
  flat_weights,
  load_model,
  open_checkpoint,
  write_checkpoint,
)
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.videochat_flash import VideoChatFlash


def make_model(config):
  return VideoChatFlash(config, rngs=nnx.Rngs(0))


@functools.cache
def random_model(config=CONFIG, dtype=jnp.float32):
  return fill_randomly(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=dtype))


def with_far_token(directory, token_id=768):
  """The tiny model with a tokenizer of few entries, one of which the model does not embed."""
  shutil.copytree(checkpoint_directory("tiny"), directory)
  fields = json.loads((golden_root() / "08_text" / "tokenizer.json").read_text())
  fields["model"]["vocab"]["far"] = token_id
  (directory / "tokenizer.json").write_text(json.dumps(fields))
  return directory


def assert_same_weights(actual, expected):
  actual, expected = (dict(flat_weights(nnx.state(model))) for model in (actual, expected))
  assert actual.keys() == expected.keys()
  for path, array in expected.items():
    assert actual[path].dtype == array.dtype, path
    assert np.asarray(actual[path]).tobytes() == np.asarray(array).tobytes(), path


def shard(directory, num_shards=3):
  """Splits the one file of a checkpoint into shards with an index; returns their names."""
  tensors = load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  names = [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(num_shards)]
  home = {tensor: names[number % num_shards] for number, tensor in enumerate(tensors)}
  for name in names:
    save_file({tensor: tensors[tensor] for tensor in tensors if home[tensor] == name},
              directory / name)  # fmt: skip
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
  return names


def edit_weights(directory, edit):
  tensors = load_file(directory / "model.safetensors")
  edit(tensors)
  save_file(tensors, directory / "model.safetensors")


def assert_refused(directory, *words, load=None):
  """Loading (or another use) fails with one line that holds all of these words."""
  with pytest.raises(InputError) as caught:
    (load or functools.partial(load_model, make_model))(directory)
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


def rewrite(directory, out, dtype=None):
  return write_checkpoint(open_checkpoint(directory), make_model, out, dtype)


def stored_bytes(directory):
  """Dtype, shape and bytes of every tensor stored in a directory."""
  return {
    name: (tensor.dtype, tensor.shape, tensor.tobytes())
    for path in directory.glob("*.safetensors")
    for name, tensor in load_file(path).items()
  }


def contents(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
