"""A language model, a raw encoder and a projector become one checkpoint, nothing left over."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.small_checkpoints import (
  assert_refused,
  assert_same_weights,
  make_model,
  random_model,
)
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import load_model, save_model, write_checkpoint
from videochat_flash_jax.checkpoints.hub.hf_config import TOWERS
from videochat_flash_jax.checkpoints.hub.parts import join_parts
from videochat_flash_jax.models.config import ConnectorConfig

ENCODER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
LANGUAGE_MODEL = {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_act": "silu",
  "vocab_size": CONFIG.decoder.vocab_size,
  "hidden_size": CONFIG.decoder.width,
  "head_dim": CONFIG.decoder.head_size,
  "num_hidden_layers": CONFIG.decoder.depth,
  "num_attention_heads": CONFIG.decoder.num_heads,
  "num_key_value_heads": CONFIG.decoder.num_kv_heads,
  "intermediate_size": CONFIG.decoder.mlp_width,
  "rope_theta": 1e6,
  "rms_norm_eps": 1e-6,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "torch_dtype": "float32",
}
KINDS = {"umt": "umt-large", "internvideo2": "internvideo2"}


def save_torch(tensors, path):
  import torch

  torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, path)


@pytest.fixture(
  params=[("safetensors", save_file), pytest.param(("pt", save_torch), marks=pytest.mark.torch)],
  ids=["safetensors", "torch"],
)
def file_kind(request):
  """Ending of a file of tensors, and the function that writes one."""
  return request.param


@pytest.fixture(params=KINDS)
def whole(request, monkeypatch):
  """A whole model of every kind of encoder; its sizes are those of the tower it is called."""
  vision = dataclasses.replace(CONFIG.vision, kind=request.param)
  monkeypatch.setitem(TOWERS, KINDS[request.param], vision)
  return random_model(dataclasses.replace(CONFIG, vision=vision, connector=ConnectorConfig()))


@pytest.fixture
def parts(whole, tmp_path, file_kind):
  """Paths of the parts that the model was taken apart into, as their makers publish them."""
  ending, save = file_kind
  save_model(whole, whole.config, tmp_path / "whole")
  tensors = load_file(tmp_path / "whole" / "model.safetensors")
  encoder, projector, rest = {}, {}, {}
  for name, tensor in tensors.items():
    if name.startswith(ENCODER):
      name = name.removeprefix(ENCODER).replace("encoder.vision_layernorm.", "encoder.norm.")
      encoder[name] = tensor
    else:
      (projector if name.startswith(PROJECTOR) else rest)[name] = tensor
  for name in list(encoder):  # one block more than the model builds
    if "blocks.1." in name:
      encoder[name.replace("blocks.1.", f"blocks.{whole.config.vision.depth}.")] = encoder[name]
  training = {"umt": "decoder.norm.weight", "internvideo2": "clip_projector.norm1_q.weight"}
  encoder[training[whole.config.vision.kind]] = np.ones(3, np.float32)
  language_model = tmp_path / "language_model"
  language_model.mkdir()
  save_file(rest, language_model / "model.safetensors")
  (language_model / "config.json").write_text(json.dumps(LANGUAGE_MODEL))
  (language_model / "tokenizer.json").write_text("{}")
  paths = {"encoder": tmp_path / f"encoder.{ending}", "projector": tmp_path / f"mm.{ending}"}
  save(encoder, paths["encoder"])
  save(projector, paths["projector"])
  return {"language_model": language_model, "tower": KINDS[whole.config.vision.kind]} | paths


def test_parts_make_the_whole_that_they_were_taken_from(whole, parts, tmp_path):
  write_checkpoint(join_parts(**parts), make_model, tmp_path / "out")
  joined = load_model(make_model, tmp_path / "out")
  assert_same_weights(joined, whole)
  assert joined.config == dataclasses.replace(whole.config, name="out")
  assert (tmp_path / "out" / "tokenizer.json").is_file()
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["mm_vision_tower"] == parts["tower"]
  assert fields["architectures"] == ["VideoChatFlashQwenForCausalLM"]
  assert fields["tokenizer_model_max_length"] == 32768


def test_a_language_model_may_be_as_transformers_5_writes_it(whole, parts, tmp_path, caplog):
  fields = LANGUAGE_MODEL | {"dtype": "float32", "layer_types": ["full_attention"] * 3}
  fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
  del fields["torch_dtype"]
  directory = parts["language_model"]
  (directory / "config.json").write_text(json.dumps(fields))
  tensors = load_file(directory / "model.safetensors")
  tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  save_file(tensors, directory / "model.safetensors")
  write_checkpoint(join_parts(**parts), make_model, tmp_path / "out")
  assert_same_weights(load_model(make_model, tmp_path / "out"), whole)
  assert "ignored, since it follows from the config: model.rotary_emb.inv_freq" in caplog.text
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["rope_theta"] == 1e6 and written["torch_dtype"] == "float32"
  assert not {"rope_parameters", "dtype", "layer_types"} & set(written)


@pytest.mark.parametrize(
  "changed, words",
  [
    ({"use_sliding_window": True}, "'use_sliding_window' is True; only false is supported"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ({"layer_types": ["sliding_attention"] * 3}, "'layer_types' is ['sliding_attention'"),
    (
      {"rope_parameters": {"rope_theta": 1e4}},
      "'rope_parameters.rope_theta' (10000.0) contradicts",
    ),
  ],
)
def test_a_language_model_with_another_attention_is_refused(parts, changed, words):
  path = parts["language_model"] / "config.json"
  path.write_text(json.dumps(LANGUAGE_MODEL | changed))
  assert_refused(path, str(path), words, load=lambda path: join_parts(**parts))


def test_a_projector_of_a_wrapped_model_is_found_by_its_name(whole, parts, tmp_path):
  tensors = {
    f"module.base_model.{name}": tensor
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items()
    if name.startswith(PROJECTOR)
  }
  save_file(tensors, tmp_path / "wrapped.safetensors")
  parts["projector"] = tmp_path / "wrapped.safetensors"
  write_checkpoint(join_parts(**parts), make_model, tmp_path / "out")
  assert_same_weights(load_model(make_model, tmp_path / "out"), whole)


def test_a_projector_that_is_not_given_is_drawn_from_the_seed(whole, parts):
  del parts["projector"]

  def drawn(seed):
    tensors = join_parts(**parts, seed=seed).tensors
    return {n: next(t.blocks()) for n, t in tensors.items() if n.startswith(PROJECTOR)}

  first, again, other = drawn(1), drawn(1), drawn(2)
  width = {"0": whole.config.vision.width, "2": whole.config.decoder.width}
  for name, values in first.items():
    bound = width[name.split(".")[-2]] ** -0.5
    assert values.dtype == np.float32 and 0.5 * bound < np.abs(values).max() <= bound
    assert (values == again[name]).all() and (values != other[name]).any()


def test_what_is_neither_built_nor_known_is_named(parts, tmp_path):
  name = "encoder.odd" if "umt" in parts["tower"] else "odd"
  parts["encoder"] = tmp_path / "odd.safetensors"
  save_file({name: np.ones(2, np.float32)}, parts["encoder"])
  assert_refused(
    parts["encoder"],
    str(parts["encoder"]),
    f"unexpected: {ENCODER}{name};",
    load=lambda path: write_checkpoint(join_parts(**parts), make_model, tmp_path / "out"),
  )


def test_an_encoder_of_another_kind_does_not_fit(parts, tmp_path):
  parts["tower"] = "internvideo2" if parts["tower"] == "umt-large" else "umt-large"
  assert_refused(
    parts["encoder"],
    f"missing: {ENCODER}",
    load=lambda path: write_checkpoint(join_parts(**parts), make_model, tmp_path / "out"),
  )


@pytest.mark.parametrize(
  "part, name, words",
  [
    ("encoder", "absent.pt", "absent.pt: no such file"),
    ("projector", "absent.bin", "absent.bin: no such file"),
    ("encoder", "a" * 300, "aa: no such file"),
    ("encoder", "config.yaml", "config.yaml: give a .safetensors file or a PyTorch file"),
    ("language_model", "whole", "'model_type' is 'videochat_flash_qwen'; give a Qwen2"),
  ],
)
def test_a_part_that_is_none_is_refused(parts, tmp_path, part, name, words):
  (tmp_path / "config.yaml").touch()
  assert_refused(tmp_path / name, words, load=lambda path: join_parts(**parts | {part: path}))
