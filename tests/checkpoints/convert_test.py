import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.models.small_models import CONFIG, fill_randomly
from videochat_flash_jax.checkpoints import convert
from videochat_flash_jax.checkpoints.convert import flat_weights, load_model, save_model
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.videochat_flash import VideoChatFlash


def make_model(config):
  return VideoChatFlash(config, rngs=nnx.Rngs(0))


def random_model(config=CONFIG, dtype=jnp.float32):
  return fill_randomly(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=dtype))


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


@pytest.fixture
def checkpoint(tmp_path):
  """A directory that holds a small model."""
  directory = tmp_path / "small"
  save_model(random_model(), CONFIG, directory)
  return directory


def assert_refused(directory, *words):
  """Loading fails with one line that holds all of these words."""
  with pytest.raises(InputError) as caught:
    load_model(make_model, directory)
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_saved_model_loads_bit_for_bit_and_saves_to_the_same_bytes(tmp_path, dtype):
  model = random_model(dtype=dtype)
  save_model(model, CONFIG, tmp_path / "small")
  loaded = load_model(make_model, tmp_path / "small", dtype)
  assert_same_weights(loaded, model)
  assert loaded.config == CONFIG
  save_model(loaded, loaded.config, tmp_path / "again" / "small")
  for name in ("config.json", "model.safetensors"):
    again = (tmp_path / "again" / "small" / name).read_bytes()
    assert again == (tmp_path / "small" / name).read_bytes()


def test_bfloat16_files_load_in_float32_without_loss(tmp_path):
  model = random_model(dtype=jnp.bfloat16)
  save_model(model, CONFIG, tmp_path)
  for path, array in flat_weights(nnx.state(load_model(make_model, tmp_path))):
    expected = dict(flat_weights(nnx.state(model)))[path].astype(jnp.float32)
    assert array.dtype == jnp.float32
    np.testing.assert_array_equal(array, expected)


def test_shards_hold_the_same_model(checkpoint):
  shard(checkpoint)
  assert_same_weights(load_model(make_model, checkpoint), random_model())


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(checkpoint):
  def edit(tensors):
    del tensors["model.norm.weight"]
    for layer in (0, 2):
      del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.mm_projector.mlp.0.bias"] = np.zeros(5, np.float32)

  edit_weights(checkpoint, edit)
  assert_refused(
    checkpoint,
    str(checkpoint),
    "missing: model.layers.{0,2}.mlp.up_proj.weight, model.norm.weight",
    "unexpected: model.extra.weight",
    f"model.mm_projector.mlp.0.bias (is (5,), should be ({CONFIG.decoder.width},))",
  )


def test_weights_that_are_no_floating_point_numbers_are_named(checkpoint):
  def edit(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

  edit_weights(checkpoint, edit)
  assert_refused(checkpoint, str(checkpoint), "of another dtype", "model.norm.weight (is I8)")


def test_a_layer_too_many_is_unexpected(checkpoint):
  config = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(CONFIG.decoder, depth=CONFIG.decoder.depth - 1)
  )
  convert.write_config(config, checkpoint, dtype="float32")
  last = CONFIG.decoder.depth - 1
  assert_refused(checkpoint, f"unexpected: model.layers.{last}.input_layernorm.weight")


def test_a_tied_model_stores_no_head(tmp_path):
  tied = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tied_embeddings=True)
  )
  model = random_model(tied)
  save_model(model, tied, tmp_path)
  assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
  assert_same_weights(load_model(make_model, tmp_path), model)


def test_a_stored_head_counts_even_if_the_config_says_tied(checkpoint):
  fields = json.loads((checkpoint / "config.json").read_text())
  (checkpoint / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
  loaded = load_model(make_model, checkpoint)
  assert not loaded.config.decoder.tied_embeddings
  assert_same_weights(loaded, random_model())


def test_half_a_file_is_refused(checkpoint):
  path = checkpoint / "model.safetensors"
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert_refused(checkpoint, str(path), "not a whole safetensors file")


def test_a_file_of_another_kind_is_refused(checkpoint):
  path = checkpoint / "model.safetensors"
  path.write_text("these are no weights, though the file is long enough to be read")
  assert_refused(checkpoint, str(path), "not a whole safetensors file")


def test_missing_shards_are_named(checkpoint):
  first, _, third = shard(checkpoint)
  (checkpoint / first).unlink()
  (checkpoint / third).unlink()
  assert_refused(checkpoint, f"shards missing: {first}, {third};")


def test_a_tensor_in_two_shards_is_refused(checkpoint):
  names = shard(checkpoint)
  tensors = load_file(checkpoint / names[0])
  save_file(load_file(checkpoint / names[1]) | tensors, checkpoint / names[1])
  assert_refused(checkpoint, names[1], f"tensor '{min(tensors)}' is in another shard, too")


@pytest.mark.parametrize(
  "text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 5}}', "[" * 100_000]
)
def test_an_index_that_is_none_is_refused(checkpoint, text):
  shard(checkpoint)
  (checkpoint / "model.safetensors.index.json").write_text(text)
  assert_refused(checkpoint, "model.safetensors.index.json", "no index of shards")


def test_a_directory_without_weights_is_refused(checkpoint):
  (checkpoint / "model.safetensors").unlink()
  assert_refused(checkpoint, "neither model.safetensors nor model.safetensors.index.json is there")


def test_a_directory_without_config_is_refused(checkpoint):
  (checkpoint / "config.json").unlink()
  assert_refused(checkpoint, str(checkpoint / "config.json"), "no such file")


def test_a_save_that_fails_leaves_what_was_there(checkpoint, monkeypatch):
  before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

  def fill_the_disk(tensors, path, metadata):
    path.write_bytes(b"half of it")
    raise OSError("No space left on device")

  monkeypatch.setattr(convert, "save_file", fill_the_disk)
  other = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, min_frames=8))
  with pytest.raises(OSError, match="No space"):
    save_model(random_model(), other, checkpoint)
  assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
