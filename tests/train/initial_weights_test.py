"""First weights of a run: from checkpoints, runs and parts; what does not fit is refused early."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.checkpoints.small_checkpoints import edit_weights, make_model, random_model
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import (
  flat_weights,
  open_checkpoint,
  save_model,
  write_checkpoint,
)
from videochat_flash_jax.checkpoints.hub.hf_config import read_config
from videochat_flash_jax.checkpoints.hub.int8_tensors import in_int8
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.initial_weights import copy_hub_files, initial_weights

CPU = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
LANGUAGE_MODEL = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")


def wanted(config=CONFIG):
  """The decoder is trained, in float32; the rest is frozen in bfloat16."""
  state = nnx.state(nnx.eval_shape(lambda: make_model(config)))
  return {
    path: jax.ShapeDtypeStruct(
      leaf.shape, jnp.float32 if path.startswith("decoder") else jnp.bfloat16, sharding=CPU
    )
    for path, leaf in flat_weights(state)
  }


def expected(config=CONFIG):
  return {path: np.asarray(w) for path, w in flat_weights(nnx.state(random_model(config)))}


def assert_begins(init_from, but=()):
  """All weights are those of the random model, except for parts that are drawn again."""
  weights, shapes = initial_weights(str(init_from), CONFIG, wanted()), wanted()
  assert weights.keys() == shapes.keys()
  for path, array in weights.items():
    assert array.dtype == shapes[path].dtype and array.sharding == CPU
    if not path.startswith(tuple(but)):
      np.testing.assert_array_equal(array, expected()[path].astype(array.dtype), err_msg=path)


def assert_refused(init_from, *words, config=CONFIG):
  for refuse in (
    lambda: initial_weights(str(init_from), config, wanted()),
    lambda: copy_hub_files(str(init_from), config, init_from / "nothing is written here"),
  ):
    with pytest.raises(InputError) as caught:
      refuse()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
      assert word in message, message
    if isinstance(init_from, str):
      return
  assert not (init_from / "nothing is written here").exists()


@pytest.fixture
def checkpoint(tmp_path):
  directory = tmp_path / "small"
  save_model(random_model(), CONFIG, directory)
  return directory


@pytest.fixture
def parts(checkpoint, tmp_path):
  """The same weights in the files of a language model, an encoder and a projector."""
  tensors = load_file(checkpoint / "model.safetensors")
  language_model = tmp_path / "qwen2"
  language_model.mkdir()
  fields = json.loads((checkpoint / "config.json").read_text())
  fields = {k: v for k, v in fields.items() if "mm_" not in k and k != "videochat_flash_jax"}
  fields |= {"model_type": "qwen2", "head_dim": CONFIG.decoder.head_size}
  (language_model / "config.json").write_text(json.dumps(fields))
  (language_model / "merges.txt").write_text("#version: 0.2\n")
  of_decoder = {n: t for n, t in tensors.items() if n.startswith(LANGUAGE_MODEL)}
  save_file(of_decoder, language_model / "model.safetensors")
  tower = "model.vision_tower.vision_tower."
  encoder = {n.removeprefix(tower): t for n, t in tensors.items() if n.startswith(tower)}
  save_file(encoder, tmp_path / "encoder.safetensors")
  projector = {n: t for n, t in tensors.items() if "mm_projector" in n}
  save_file(projector, tmp_path / "projector.safetensors")
  return language_model, tmp_path / "encoder.safetensors", tmp_path / "projector.safetensors"


def test_a_checkpoint_is_read_in_the_given_dtypes_to_the_given_devices(checkpoint):
  assert_begins(checkpoint)


@pytest.mark.parametrize("name", ["a + b", "ends with a blank ", "c%20d", "e#f?", "[1]"])
def test_a_directory_may_have_any_name(checkpoint, tmp_path, name):
  checkpoint.rename(tmp_path / name)
  assert_begins(tmp_path / name)
  copy_hub_files(str(tmp_path / name), CONFIG, tmp_path / "run" / "hub")
  assert read_config(tmp_path / "run" / "hub").decoder == CONFIG.decoder


def test_random_gives_no_weights():
  assert initial_weights("random", CONFIG, wanted()) == {}


def test_a_run_starts_with_the_last_weights_of_another_run(checkpoint, tmp_path, caplog):
  hub, workdir = tmp_path / "first" / "hub", tmp_path / "first"
  copy_hub_files(str(checkpoint), CONFIG, hub)
  state = {"trained": nnx.to_pure_dict(nnx.state(random_model())), "frozen": {}}
  with RunCheckpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(3, state, {}, {"config": {"lora": {"rank": 0}}})
  assert_begins(workdir)
  assert_begins(workdir / "checkpoints" / "3")
  copy_hub_files(str(workdir), CONFIG, tmp_path / "second" / "hub")
  assert (tmp_path / "second" / "hub" / "config.json").read_text() == (
    hub / "config.json"
  ).read_text()
  assert not caplog.records
  (workdir / "config.json").write_text('{"config": {"num_steps": 4}}')
  copy_hub_files(str(workdir), CONFIG, tmp_path / "third" / "hub")
  assert f"{workdir} is at step 3 of 4 only" in caplog.text
  caplog.clear()
  for whole in (workdir / "checkpoints" / "3", checkpoint):
    copy_hub_files(str(whole), CONFIG, tmp_path / "fourth" / "hub")
  assert not caplog.records


def test_parts_are_joined(parts):
  assert_begins(" + ".join(map(str, parts)))
  assert_begins(" + ".join(map(str, parts[:2])), but=("connector.",))


def test_the_hub_files_describe_the_model_that_is_trained(parts, tmp_path):
  larger = dataclasses.replace(CONFIG.vision, image_size=64)
  config = dataclasses.replace(CONFIG, vision=larger)
  copy_hub_files(" + ".join(map(str, parts)), config, tmp_path / "run" / "hub")
  assert read_config(tmp_path / "run" / "hub").vision == larger
  assert read_config(tmp_path / "run" / "hub").decoder == CONFIG.decoder
  assert (tmp_path / "run" / "hub" / "merges.txt").read_text() == "#version: 0.2\n"


def test_the_picture_size_of_a_run_may_differ_from_its_checkpoint(checkpoint):
  config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, image_size=64))
  assert initial_weights(str(checkpoint), config, wanted(config)).keys() == wanted().keys()


def test_a_missing_head_starts_as_the_tied_embedding(tmp_path):
  tied = dataclasses.replace(CONFIG.decoder, tied_embeddings=True)
  config = dataclasses.replace(CONFIG, decoder=tied)
  save_model(random_model(config), config, tmp_path / "tied")
  weights = initial_weights(str(tmp_path / "tied"), CONFIG, wanted())
  embedding = weights["decoder.embed_tokens.embedding"]
  np.testing.assert_array_equal(weights["decoder.lm_head.kernel"], embedding.T)


def test_a_language_model_without_an_encoder_is_refused_with_the_remedy(parts):
  assert_refused(parts[0], "only a language model", f"'{parts[0]} + ENCODER'")


def test_an_encoder_without_a_language_model_is_refused_with_the_remedy(parts):
  assert_refused(str(parts[1]), "a file", "'LANGUAGE_MODEL + ENCODER'")


@pytest.mark.parametrize(
  "part, start",
  [
    ("encoder", "model.vision_tower"),
    ("projector", "model.mm"),
    ("language model", "model.layers"),
  ],
)
def test_a_missing_part_is_named(checkpoint, part, start):
  def remove(tensors):
    for name in [name for name in tensors if name.startswith(start)]:
      del tensors[name]

  edit_weights(checkpoint, remove)
  assert_refused(checkpoint, f"lacks the {part}", "LANGUAGE_MODEL + ENCODER")


@pytest.mark.parametrize(
  "part, field, value",
  [
    ("decoder", "vocab_size", 64),
    ("decoder", "rope_theta", 5e5),
    ("vision", "depth", 5),
    ("connector", "merge_heads", 1),
  ],
)
def test_a_model_of_other_sizes_is_refused_with_the_first_field_that_differs(
  checkpoint, part, field, value
):
  changed = dataclasses.replace(getattr(CONFIG, part), **{field: value})
  before = getattr(getattr(open_checkpoint(checkpoint).config, part), field)
  config = dataclasses.replace(CONFIG, **{part: changed})
  assert_refused(
    checkpoint, f"{part}.{field} {before!r}", repr(value), "config.model", config=config
  )


@pytest.mark.parametrize("init_from", ["a + b + c + d", " + b", "", "no such + encoder.pt"])
def test_an_init_from_that_names_nothing_is_refused(init_from):
  with pytest.raises(InputError, match=re.escape("no such") + "|config.init_from"):
    initial_weights(init_from, CONFIG, wanted())


def test_int8_weights_are_not_trained(checkpoint, tmp_path):
  write_checkpoint(in_int8(open_checkpoint(checkpoint)), make_model, tmp_path / "out")
  assert_refused(tmp_path / "out", f"{tmp_path / 'out'} has int8 weights, which cannot be trained")
