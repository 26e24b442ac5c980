"""Checkpoints in: what fits is read bit for bit, and what does not is named."""

import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from tests.checkpoints.small_checkpoints import (
  assert_refused,
  assert_same_weights,
  edit_weights,
  make_model,
  random_model,
  rewrite,
  shard,
)
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import flat_weights, load_model, save_model
from videochat_flash_jax.checkpoints.hub import weights
from videochat_flash_jax.checkpoints.hub.hf_config import write_config


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


def test_tensors_that_follow_from_the_config_are_ignored_and_named_once(checkpoint, caplog):
  def edit(tensors):
    for layer in range(3):
      name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
      tensors[name] = np.ones(4, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["model.vision_tower.vision_tower.embeddings.position_ids"] = np.arange(9)[None]

  edit_weights(checkpoint, edit)
  for _ in range(2):
    assert_same_weights(load_model(make_model, checkpoint), random_model())
  rewrite(checkpoint, checkpoint.with_name("out"))
  assert_same_weights(load_model(make_model, checkpoint.with_name("out")), random_model())
  (record,) = caplog.records
  assert record.getMessage() == (
    f"{checkpoint}: ignored, since it follows from the config: "
    "model.layers.{0,1,2}.self_attn.rotary_emb.inv_freq, model.rotary_emb.inv_freq, "
    "model.vision_tower.vision_tower.embeddings.position_ids"
  )


def test_a_tensor_with_a_similar_name_is_still_unexpected(checkpoint):
  def edit(tensors):
    tensors["model.rotary_embedding.weight"] = np.ones(4, np.float32)

  edit_weights(checkpoint, edit)
  assert_refused(checkpoint, "unexpected: model.rotary_embedding.weight")


def test_weights_that_are_no_floating_point_numbers_are_named(checkpoint):
  def edit(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

  edit_weights(checkpoint, edit)
  assert_refused(checkpoint, str(checkpoint), "of another dtype", "model.norm.weight (is I8)")


def test_a_layer_too_many_is_unexpected(checkpoint):
  config = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(CONFIG.decoder, depth=CONFIG.decoder.depth - 1)
  )
  write_config(config, checkpoint, dtype="float32")
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
  assert_refused(checkpoint, str(path), "not a complete safetensors file")


def test_a_file_of_another_kind_is_refused(checkpoint):
  path = checkpoint / "model.safetensors"
  path.write_text("these are no weights, though the file is long enough to be read")
  assert_refused(checkpoint, str(path), "not a complete safetensors file")


def test_missing_shards_are_named(checkpoint):
  first, _, third = shard(checkpoint)
  (checkpoint / first).unlink()
  (checkpoint / third).unlink()
  assert_refused(checkpoint, f"shards missing: {first}, {third};")


def test_a_tensor_in_two_shards_is_refused(checkpoint):
  names = shard(checkpoint)
  tensors = load_file(checkpoint / names[0])
  save_file(load_file(checkpoint / names[1]) | tensors, checkpoint / names[1])
  assert_refused(checkpoint, names[1], f"tensor '{min(tensors)}' is also in another shard")


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    "{}",
    '{"weight_map": {}}',
    '{"weight_map": 1}',
    '{"weight_map": {"a": 5}}',
    '{"weight_map": {"a": "../model.safetensors"}}',
    "[" * 100_000,
  ],
)
def test_an_index_that_is_none_is_refused(checkpoint, text):
  shard(checkpoint)
  (checkpoint / "model.safetensors.index.json").write_text(text)
  assert_refused(checkpoint, "model.safetensors.index.json", "not an index of shards")


def test_an_index_of_other_tensors_than_its_shards_hold_is_refused(checkpoint):
  names = shard(checkpoint)
  index = checkpoint / "model.safetensors.index.json"
  file_of = json.loads(index.read_text())["weight_map"]
  del file_of[(left_out := min(file_of))]
  index.write_text(json.dumps({"weight_map": {**file_of, "nowhere": names[0]}}))
  assert_refused(checkpoint, index.name, "not name the same tensors", left_out, "nowhere")


def test_a_directory_without_weights_is_refused(checkpoint):
  (checkpoint / "model.safetensors").unlink()
  assert_refused(checkpoint, "neither model.safetensors nor model.safetensors.index.json is there")


def test_a_directory_without_config_is_refused(checkpoint):
  (checkpoint / "config.json").unlink()
  assert_refused(checkpoint, str(checkpoint / "config.json"), "no such file")


def test_a_pickle_is_not_taken_for_a_broken_file_and_not_run(checkpoint):
  class Trap:
    def __reduce__(self):
      return pytest.fail, ("unpickled",)

  (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Trap()))
  assert_refused(checkpoint, "model.safetensors: a pickle with the name of a safetensors file")


def test_a_directory_of_pickles_is_refused(checkpoint):
  (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
  assert_refused(checkpoint, str(checkpoint), "only pytorch_model.bin, which could run code")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_with_nan_or_infinity_are_all_named(checkpoint, value):
  def edit(tensors):
    tensors["model.norm.weight"][-1] = value
    for layer in (0, 2):
      tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3, 1] = value

  edit_weights(checkpoint, edit)
  names = "NaN or infinity in model.layers.{0,2}.mlp.up_proj.weight, model.norm.weight;"
  assert_refused(checkpoint, f"{checkpoint}: {names}")
  out = checkpoint.with_name("out")
  assert_refused(checkpoint, f"{checkpoint}: {names}", load=lambda path: rewrite(path, out))
  assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_number_too_large_for_the_dtype_is_infinity(checkpoint):
  edit_weights(checkpoint, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
  assert_refused(
    checkpoint,
    "NaN or infinity in model.norm.weight;",
    load=functools.partial(load_model, make_model, dtype=jnp.float16),
  )


@pytest.mark.parametrize(
  "group_bytes", [1, 2 * 4 * CONFIG.decoder.width * CONFIG.decoder.mlp_width]
)
def test_stacks_of_layers_are_filled_a_few_layers_at_a_time(checkpoint, monkeypatch, group_bytes):
  monkeypatch.setattr(weights, "_GROUP_BYTES", group_bytes)
  assert_same_weights(load_model(make_model, checkpoint), random_model())


@pytest.mark.parametrize("group_bytes", [1, 2**20])
def test_every_array_goes_where_its_path_says(checkpoint, monkeypatch, group_bytes):
  monkeypatch.setattr(weights, "_GROUP_BYTES", group_bytes)
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"))

  def sharding_of(path, shape):
    cut = path.endswith(("kernel", "embedding"))
    spec = (None, "fsdp") if "stacked" in path else ("fsdp",)
    return NamedSharding(mesh, PartitionSpec(*spec) if cut else PartitionSpec())

  loaded = load_model(make_model, checkpoint, sharding_of=sharding_of)
  assert_same_weights(loaded, random_model())
  for path, array in flat_weights(nnx.state(loaded)):
    assert array.sharding.is_equivalent_to(sharding_of(path, array.shape), array.ndim), path
