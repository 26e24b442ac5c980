"""Every released size is built, without its memory: names, shapes and numbers of parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.conftest import release_facts
from videochat_flash_jax.checkpoints.convert import flat_weights
from videochat_flash_jax.checkpoints.hub.hf_mapping import hub_tensors
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

RELEASED = {
  name: getattr(VideoChatFlashConfig, name)()
  for name, member in vars(VideoChatFlashConfig).items()
  if isinstance(member, classmethod) and name != "tiny"
}
OFFICIAL = {  # constructor -> model of state_dict_names.json
  "qwen2_7b_res224": "umt_l_224+qwen2_7b",
  "qwen2_7b_res448": "umt_l_448+qwen2_7b",
  "qwen2_5_2b_res448": "umt_l_448+qwen2_1_5b",
  "qwen2_5_7b_1m_res224": "umt_l_224+qwen2_7b",
  "qwen2_5_7b_internvideo2_1b": "internvideo2_1b_224+qwen2_7b",
}


@pytest.fixture(scope="module")
def official():
  return release_facts("state_dict_names.json")


def build(name, dtype=jnp.float32):
  config = RELEASED[name]
  return nnx.eval_shape(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=dtype))


def shapes_of(model):
  return {path: leaf.shape for path, leaf in flat_weights(nnx.state(model))}


def test_every_constructor_has_its_official_model(official):
  assert RELEASED.keys() == OFFICIAL.keys()
  assert set(OFFICIAL.values()) <= official["models"].keys()


@pytest.mark.parametrize("name", RELEASED)
def test_every_official_tensor_maps_once_to_its_shape(official, name):
  parts = official["models"][OFFICIAL[name]]
  expected = {}
  for part in ("vision_tower", "mm_projector", "llm"):
    expected |= official["parts"][parts[part]]
  tensors = hub_tensors(shapes_of(build(name)), stored=expected)
  assert {tensor.name: list(tensor.shape) for tensor in tensors.values()} == expected
  assert len(tensors) == parts["n_tensors"]
  filled = [(tensor.path, tensor.layer) for tensor in tensors.values()]
  assert len(set(filled)) == len(filled)


@pytest.mark.parametrize("name", RELEASED)
def test_parts_have_their_official_number_of_parameters(official, name):
  parts = official["models"][OFFICIAL[name]]
  shapes = shapes_of(build(name))
  counts = {
    part: sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(f"{part}."))
    for part in ("vision", "connector", "decoder")
  }
  assert counts["vision"] == parts["params_vision"]
  assert counts["connector"] == parts["params_projector"]
  # A tied head is counted once officially; the released files store it, and so do we.
  head = math.prod(shapes["decoder.lm_head.kernel"]) if parts["tie_word_embeddings"] else 0
  assert counts["decoder"] == parts["params_llm"] + head


def test_the_7b_model_takes_the_bytes_of_its_released_files():
  leaves = jax.tree.leaves(nnx.state(build("qwen2_7b_res448", jnp.bfloat16)))
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 15_845_235_712


@pytest.mark.parametrize("name", RELEASED)
def test_a_clip_and_a_tile_become_the_tokens_of_the_paper(name):
  size = RELEASED[name].vision.image_size
  for frames in (4, 1):
    clips = jax.ShapeDtypeStruct((2, frames, size, size, 3), jnp.uint8)
    tokens = nnx.eval_shape(lambda model, clips: model.encode(clips), build(name), clips)
    assert tokens.shape == (2, 64, RELEASED[name].decoder.width)


def test_an_unknown_encoder_is_named_beside_the_known_ones():
  config = RELEASED["qwen2_7b_res448"]
  config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, kind="siglip"))
  with pytest.raises(InputError, match=r"encoder 'siglip' .* unknown; known: umt, internvideo2"):
    VideoChatFlash(config, rngs=nnx.Rngs(0))
