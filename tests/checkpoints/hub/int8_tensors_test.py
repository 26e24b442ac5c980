"""Int8 weights: near the wide ones, the same after going out and in, and never half there."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.checkpoints.small_checkpoints import (
  assert_refused,
  assert_same_weights,
  edit_weights,
  make_model,
  random_model,
  shard,
  stored_bytes,
)
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import (
  flat_weights,
  load_model,
  open_checkpoint,
  save_model,
  write_checkpoint,
)
from videochat_flash_jax.checkpoints.hub import int8_tensors, safetensors_files

TIED = dataclasses.replace(
  CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tied_embeddings=True)
)
UP = "model.layers.1.mlp.up_proj.weight"
load_int8 = functools.partial(load_model, make_model, weights="int8")


def weights_of(model):
  return {path: np.asarray(array) for path, array in flat_weights(nnx.state(model))}


def write_int8(checkpoint, out, dtype=None):
  return write_checkpoint(int8_tensors.in_int8(open_checkpoint(checkpoint)), make_model, out, dtype)


@pytest.fixture
def int8(checkpoint):
  """A directory that holds the small model in int8."""
  write_int8(checkpoint, checkpoint.with_name("int8"))
  return checkpoint.with_name("int8")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_matrices_of_the_decoder_are_within_half_a_step_of_the_wide_ones(checkpoint, dtype):
  loaded, wide = weights_of(load_int8(checkpoint, dtype)), weights_of(random_model())
  quantised = {path.removesuffix(".qvalue") for path in loaded if path.endswith(".qvalue")}
  names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  assert quantised == {
    "decoder.embed_tokens.embedding",
    "decoder.lm_head.kernel",
    *(f"decoder.layers.stacked.{name}.kernel" for name in names),
  }
  for path, array in wide.items():
    if path not in quantised:
      np.testing.assert_array_equal(loaded[path], array.astype(dtype), err_msg=path)
      continue
    values, scales = loaded[f"{path}.qvalue"], loaded[f"{path}.scale"]
    summed = -1 if path.endswith("embedding") else -2
    assert (values.dtype, scales.dtype) == (np.int8, dtype)
    assert scales.shape == np.max(array, axis=summed, keepdims=True).shape
    exact = np.abs(array).max(axis=summed, keepdims=True) / 127.5
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(scales.astype(np.float32), exact, rtol=tolerance)
    assert np.abs(values * exact - array).max() <= 0.51 * exact.max(), path


def test_out_and_in_and_out_again_keeps_every_byte(checkpoint, int8, tmp_path):
  model = load_model(make_model, int8)
  assert_same_weights(model, load_int8(checkpoint))
  assert_same_weights(load_int8(int8), model)
  write_checkpoint(open_checkpoint(int8), make_model, tmp_path / "written" / "int8")
  save_model(model, model.config, tmp_path / "saved" / "int8", source=int8)
  save_model(model, model.config, tmp_path / "bare" / "int8")
  for way in ("written", "saved", "bare"):
    again = tmp_path / way / "int8"
    assert stored_bytes(again) == stored_bytes(int8), way
    fields, expected = (json.loads((d / "config.json").read_text()) for d in (again, int8))
    assert fields == expected, way


def test_the_files_have_clear_names_and_the_config_says_what_they_hold(checkpoint, int8):
  tensors, wide = load_file(int8 / "model.safetensors"), load_file(checkpoint / "model.safetensors")
  assert {name for name in tensors if tensors[name].dtype == np.int8} == {
    name.removesuffix("_scale") for name in tensors.keys() - wide.keys()
  }
  assert wide.keys() < tensors.keys()
  assert tensors[UP].shape == wide[UP].shape
  assert (tensors[f"{UP}_scale"].dtype, tensors[f"{UP}_scale"].shape) == (np.float32, (20, 1))
  fields = json.loads((int8 / "config.json").read_text())
  assert fields["torch_dtype"] == "float32"
  assert fields.pop("quantization_config") == {
    "quant_method": "videochat_flash_jax",
    "weights": "int8",
  }
  assert fields == json.loads((checkpoint / "config.json").read_text())


def test_another_dtype_is_that_of_all_but_the_int8_values(checkpoint, int8, tmp_path):
  write_int8(checkpoint, tmp_path / "out", "bfloat16")
  tensors, expected = load_file(tmp_path / "out" / "model.safetensors"), stored_bytes(int8)
  for name, tensor in tensors.items():
    if expected[name][0] == np.int8:
      assert tensor.tobytes() == expected[name][2]
    else:
      assert tensor.dtype == jnp.bfloat16
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_neither_the_size_of_pieces_nor_shards_change_a_byte(checkpoint, int8, monkeypatch):
  monkeypatch.setattr(int8_tensors, "_PIECE_VALUES", 100)
  monkeypatch.setattr(safetensors_files, "_BLOCK_BYTES", 3000)
  shard(checkpoint)
  write_int8(checkpoint, checkpoint.with_name("again"))
  assert stored_bytes(checkpoint.with_name("again")) == stored_bytes(int8)


def test_a_tied_embedding_stays_tied(tmp_path):
  save_model(random_model(TIED), TIED, tmp_path / "tied")
  loaded = load_int8(tmp_path / "tied")
  assert loaded.config.decoder.tied_embeddings
  assert "decoder.embed_tokens.embedding.qvalue" in weights_of(loaded)
  assert loaded.decoder.head.shape == (TIED.decoder.width, TIED.decoder.vocab_size)


@pytest.mark.parametrize(
  "edit, words",
  [
    (lambda t: t.pop(f"{UP}_scale"), [f"missing: {UP}_scale"]),
    (lambda t: t.pop(UP), [f"missing: {UP};"]),
    (
      lambda t: t.update({UP: t[UP].astype(np.float32)}),
      [f"of another dtype than I8: {UP} (is F32)"],
    ),
    (
      lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"].astype(np.int8)}),
      [f"of another dtype than F64, F32, F16, BF16: {UP}_scale (is I8)"],
    ),
    (
      lambda t: t.update({f"{UP}_scale": np.ones(20, np.float32)}),
      [f"of another shape: {UP}_scale (is (20,), should be (20, 1))"],
    ),
    (
      lambda t: t.update({"model.norm.weight_scale": np.ones((24, 1), np.float32)}),
      ["unexpected: model.norm.weight_scale"],
    ),
    (lambda t: t[f"{UP}_scale"].__setitem__(3, np.nan), [f"NaN or infinity in {UP}_scale"]),
  ],
)
def test_tensors_that_do_not_fit_are_named(int8, edit, words):
  edit_weights(int8, edit)
  assert_refused(int8, *words)


def test_a_config_that_does_not_tell_of_int8_is_refused(int8, checkpoint):
  (int8 / "config.json").write_text((checkpoint / "config.json").read_text())
  assert_refused(int8, "unexpected: ", "weight_scale", f"{UP} (is I8)".replace(".1.", ".{0,1,2}."))


def test_a_config_that_tells_of_int8_where_there_is_none_is_refused(int8, checkpoint):
  (checkpoint / "config.json").write_text((int8 / "config.json").read_text())
  assert_refused(checkpoint, "missing: ", "weight_scale", "of another dtype than I8", "(is F32)")


@pytest.mark.parametrize("use", [load_int8, lambda path: write_int8(path, path / ".." / "out")])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_wide_weight_that_is_not_finite_is_named(checkpoint, use, value):
  edit_weights(checkpoint, lambda tensors: tensors[UP].__setitem__((1, 2), value))
  assert_refused(checkpoint, f"{checkpoint}: NaN or infinity in {UP};", load=use)


def test_tensors_that_do_not_fit_are_named_before_any_is_made_int8(checkpoint, monkeypatch):
  monkeypatch.setattr(int8_tensors, "_quantise", lambda _: pytest.fail("a tensor was read"))

  def edit(tensors):
    tensors[UP] = np.ones(3, np.int32)
    tensors["lm_head.weight"] = np.ones((), np.float32)

  edit_weights(checkpoint, edit)
  assert_refused(
    checkpoint, f"{UP} (is (3,)", f"{UP} (is I32)", "lm_head.weight (is ()", load=load_int8
  )
