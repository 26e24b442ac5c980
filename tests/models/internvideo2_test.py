import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import CONFIG, DECODER, VISION, fill_randomly, normal
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.internvideo2 import (
  InternVideo2,
  joint_image_positions,
  resample_positions,
  sincos_positions,
)
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

CONFIG = dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, kind="internvideo2"))
VISION = CONFIG.vision
SIDE, GRID = VISION.image_size, VISION.grid_size
PATCHES = GRID**2


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: InternVideo2(VISION, rngs=nnx.Rngs(0)))


@pytest.fixture
def patch_by_patch():
  """A model whose blocks add nothing: every feature depends on its own patch alone."""
  model = fill_randomly(lambda: InternVideo2(VISION, rngs=nnx.Rngs(0)))
  for scale in (model.blocks.stacked.attention_scale, model.blocks.stacked.mlp_scale):
    scale[...] = jnp.zeros_like(scale[...])
  return model


encode = nnx.jit(InternVideo2.__call__)


def test_features_stand_frame_after_frame_and_row_after_row(patch_by_patch):
  pixels = normal(1, 4, SIDE, SIDE, 3)
  before = encode(patch_by_patch, pixels)
  frame, row, column = 2, 1, 3
  size = VISION.patch_size
  touched = pixels.at[0, frame, row * size + 5, column * size + 2, 1].add(1.0)
  changed = (encode(patch_by_patch, touched) != before).any(axis=-1)
  expected = frame * PATCHES + row * GRID + column
  np.testing.assert_array_equal(np.flatnonzero(changed), [expected])


@pytest.mark.parametrize("frames", [4, 1], ids=["clip", "image"])
def test_each_patch_gets_its_learned_position_and_the_class_token_does_not_come_out(
  patch_by_patch, frames
):
  table = patch_by_patch.image_positions if frames == 1 else patch_by_patch.video_positions
  features = encode(patch_by_patch, jnp.zeros((1, frames, SIDE, SIDE, 3)))
  expected = patch_by_patch.patch_embed.bias[...] + table[...][1:]
  assert_close(features[0], expected, absolute=1e-6)


def test_every_patch_of_a_clip_sees_every_other_and_the_class_token(model):
  pixels = normal(1, 4, SIDE, SIDE, 3)
  before = encode(model, pixels)
  changed = before != encode(model, pixels.at[0, 3, 0, 0, 0].add(1.0))
  assert changed.any(axis=-1).all()
  graph, weights = nnx.split(model)
  other = nnx.merge(graph, jax.tree.map(jnp.copy, weights))
  other.class_token[...] += 1
  assert (before != encode(other, pixels)).any(axis=-1).all()


def reference_block(block, x):
  """The block in numpy, in float64."""

  def norm(layer, x):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * layer.scale[...]

  def linear(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + layer.bias[...]

  h = norm(block.norm1, x) @ np.asarray(block.qkv.kernel[...], np.float64)
  q, k, v = np.split(h, 3, axis=-1)
  q, k = norm(block.q_norm, q), norm(block.k_norm, k)
  q, k, v = (part.reshape(*x.shape[:-1], VISION.num_heads, -1) for part in (q, k, v))
  scores = np.einsum("cphd,cshd->chps", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores)
  weights /= weights.sum(axis=-1, keepdims=True)
  mixed = np.einsum("chps,cshd->cphd", weights, v).reshape(x.shape)
  x = x + linear(block.proj, mixed) * block.attention_scale[...]
  hidden = linear(block.fc1, norm(block.norm2, x))
  hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
  return x + linear(block.fc2, hidden) * block.mlp_scale[...]


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["usual", "of little variance"])
def test_a_block_agrees_with_its_formula_for_features(model, scale):
  graph, weights = nnx.split(model.blocks.stacked)
  block = nnx.merge(graph, jax.tree.map(lambda stacked: stacked[0], weights))
  block.qkv.kernel[...] *= scale  # else queries and keys are large again after the first norm
  block.attention_scale[...] *= scale  # else the second norm sees the bias and not the features
  x = normal(2, 9, VISION.width, scale=scale)
  assert_close(block(x), reference_block(block, np.asarray(x, np.float64)), relative=2e-6)


def test_a_clip_is_encoded_alike_alone_and_in_a_batch(model):
  pixels = normal(3, 4, SIDE, SIDE, 3)
  together = encode(model, pixels)
  for clip in range(3):
    assert_close(encode(model, pixels[clip : clip + 1])[0], together[clip], relative=2e-6)


def test_bfloat16_weights_give_nearly_the_same_features(model):
  graph, weights = nnx.split(model)
  narrow = nnx.merge(graph, jax.tree.map(lambda array: array.astype(jnp.bfloat16), weights))
  pixels = normal(2, 4, SIDE, SIDE, 3)
  features = encode(narrow, pixels.astype(jnp.bfloat16))
  assert features.dtype == jnp.bfloat16
  expected = encode(model, pixels)
  error = np.abs(features.astype(jnp.float32) - expected).mean()
  assert error < 0.01 * np.abs(expected).mean()


@nnx.jit
def encode_frames(model, frames):
  return model.encode_patches(frames), model.encode(frames)


@pytest.mark.parametrize("frames", [4, 1], ids=["clips", "tiles"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_whole_model_encodes_with_it(frames, dtype):
  model = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0), param_dtype=dtype))
  rng = np.random.default_rng(0)
  clips = jnp.asarray(rng.integers(0, 256, (2, frames, SIDE, SIDE, 3)), jnp.uint8)
  features, tokens = encode_frames(model, clips)
  assert features.shape == (2, frames * PATCHES, VISION.width)
  assert tokens.shape == (2, CONFIG.connector.clip_tokens, DECODER.width)
  assert tokens.dtype == dtype
  assert np.isfinite(tokens.astype(jnp.float32)).all()


def test_training_starts_from_the_sinusoids_with_blocks_that_add_little():
  model = InternVideo2(VISION, rngs=nnx.Rngs(0))
  video = sincos_positions(VISION.width, num_frames=4, grid=GRID)
  np.testing.assert_array_equal(model.video_positions[...], video)
  np.testing.assert_array_equal(model.image_positions[...], video[: 1 + PATCHES])
  pixels = normal(1, 4, SIDE, SIDE, 3)
  features = encode(model, pixels)
  model.blocks.stacked.attention_scale[...] *= 0
  model.blocks.stacked.mlp_scale[...] *= 0
  assert_close(features, encode(model, pixels), absolute=1e-3)


def test_a_frame_a_column_and_a_row_show_in_their_own_channels():
  table = sincos_positions(16, num_frames=2, grid=3)
  assert table.shape == (19, 16)
  np.testing.assert_array_equal(table[0], np.zeros(16))
  patches = table[1:].reshape(2, 3, 3, 16)
  moved = {
    "frame": patches[1, 0, 0] != patches[0, 0, 0],
    "column": patches[0, 0, 1] != patches[0, 0, 0],
    "row": patches[0, 1, 0] != patches[0, 0, 0],
  }
  channels = {axis: list(np.flatnonzero(changed)) for axis, changed in moved.items()}
  assert channels == {
    "frame": list(range(4)), "column": list(range(4, 10)), "row": list(range(10, 16)),
  }  # fmt: skip


def test_a_width_without_sinusoids_is_refused():
  with pytest.raises(InputError, match=r"'vision\.width' is 24; .* multiple of 16"):
    sincos_positions(24, num_frames=4, grid=4)


def test_positions_of_the_same_size_are_left_alone():
  table = np.asarray(normal(1 + 4 * PATCHES, 16))
  same = resample_positions(table, table_frames=4, num_frames=4, grid=GRID)
  assert_close(same, table, relative=1e-7)
  assert same.dtype == table.dtype


def test_a_joint_table_gives_images_the_mean_over_the_frames():
  table = np.asarray(normal(1 + 4 * PATCHES, 16))
  image = joint_image_positions(table, table_frames=4)
  np.testing.assert_array_equal(image[0], table[0])
  assert_close(image[1:], table[1:].reshape(4, PATCHES, 16).mean(axis=0), relative=1e-6)
