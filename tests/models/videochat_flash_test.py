import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.models.small_models import CONFIG, DECODER, VISION, fill_randomly, normal
from videochat_flash_jax.models import qwen2, videochat_flash
from videochat_flash_jax.models.config import PIXEL_MEAN, PIXEL_STD
from videochat_flash_jax.models.videochat_flash import VideoChatFlash, normalise_pixels


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0)))


def frames_of(clips, frames=4, seed=0):
  shape = (clips, frames, VISION.image_size, VISION.image_size, 3)
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def test_pixels_are_normalised_per_channel():
  pixels = jnp.array([[0, 0, 0], [255, 255, 255], [10, 128, 200]], jnp.uint8)
  expected = (np.asarray(pixels) / 255 - PIXEL_MEAN) / PIXEL_STD
  assert_close(normalise_pixels(pixels), expected, absolute=1e-6)


@nnx.jit
def encode(model, frames):
  """Visual tokens at once, and features and tokens one part after another."""
  features = model.vision(normalise_pixels(frames))
  return model.encode(frames), model.encode_patches(frames), features, model.connector(features)


@pytest.mark.parametrize("frames", [4, 1], ids=["clips", "tiles"])
def test_encoding_is_the_encoder_then_the_connector(model, frames):
  tokens, features, expected_features, expected_tokens = encode(model, frames_of(2, frames))
  assert_close(features, expected_features, relative=2e-6)
  assert tokens.shape == (2, CONFIG.connector.clip_tokens, DECODER.width)
  assert_close(tokens, expected_tokens, relative=2e-6)


def test_a_sequence_is_text_with_visual_tokens_in_their_places(model):
  tokens = normal(1, CONFIG.connector.clip_tokens, DECODER.width)
  index = jnp.array([[-1, 0, 1, 2, 3, 4, 5, -1]])
  sequence = model.embed_sequence(jnp.full((1, 8), 7), tokens, index)
  np.testing.assert_array_equal(sequence[0, 1:7], tokens[0])
  np.testing.assert_array_equal(sequence[0, ::7], model.decoder.embed(jnp.full((1, 2), 7))[0])


def test_bfloat16_weights_compute_in_bfloat16():
  model = nnx.eval_shape(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
  tokens = nnx.eval_shape(lambda model: model.encode(frames_of(1)), model)
  assert tokens.dtype == jnp.bfloat16


def test_only_text_reads_the_table_with_a_gradient(model, monkeypatch):
  """At a visual token's place the id is 0, and what it reads is not used."""
  seen = []

  def recorded(table, token_ids, layout):
    seen.append(np.asarray(token_ids))
    return table[jnp.maximum(token_ids, 0)]

  monkeypatch.setattr(qwen2, "embed", recorded)
  tokens = normal(1, CONFIG.connector.clip_tokens, DECODER.width)
  model.embed_sequence(jnp.array([[0, 9, 0, 0, 0]]), tokens, jnp.array([[-1, -1, 0, 1, -1]]))
  np.testing.assert_array_equal(seen[0], [[0, 9, -1, -1, 0]])


def test_gradients_of_many_groups_of_clips_are_summed_in_float32(monkeypatch):
  """The first token of each of 600 tiles adds 1 to a bias; a sum in bfloat16 stays at 256."""
  monkeypatch.setattr(videochat_flash, "_MAX_PATCHES_PER_GROUP", 1)
  config = dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, depth=1, image_size=16))
  model = fill_randomly(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  tiles = jnp.zeros((1, 600, 1, 16, 16, 3), jnp.uint8)
  graph, weights = nnx.split(model)

  @quick_jit
  def gradient(weights):
    def loss(weights):
      tokens = nnx.merge(graph, weights).encode_rows(tiles)
      return tokens.reshape(600, -1, DECODER.width)[:, 0].astype(jnp.float32).sum()

    return jax.grad(loss)(weights)

  bias = gradient(weights)["connector"]["fc2"]["bias"][...]
  np.testing.assert_array_equal(bias.astype(jnp.float32), np.full(DECODER.width, 600))
