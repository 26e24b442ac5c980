import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import VISION, fill_randomly, normal
from videochat_flash_jax.models.umt import UMT, position_table

SIDE = VISION.image_size
PATCHES = VISION.grid_size**2


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: UMT(VISION, rngs=nnx.Rngs(0)))


@pytest.fixture
def patch_by_patch():
  """A model whose blocks add nothing: every feature depends on its own patch alone."""
  model = fill_randomly(lambda: UMT(VISION, rngs=nnx.Rngs(0)))
  stacked = model.blocks.stacked
  for layer in (stacked.proj, stacked.fc2):
    layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    layer.bias[...] = jnp.zeros_like(layer.bias[...])
  model.norm.scale[...] = jnp.ones(VISION.width)
  model.norm.bias[...] = jnp.zeros(VISION.width)
  return model


encode = nnx.jit(UMT.__call__)


def test_features_stand_frame_after_frame_and_row_after_row(patch_by_patch):
  pixels = normal(1, 4, SIDE, SIDE, 3)
  before = encode(patch_by_patch, pixels)
  frame, row, column = 2, 1, 3
  size = VISION.patch_size
  touched = pixels.at[0, frame, row * size + 5, column * size + 2, 1].add(1.0)
  changed = (encode(patch_by_patch, touched) != before).any(axis=-1)
  expected = frame * PATCHES + row * VISION.grid_size + column
  np.testing.assert_array_equal(np.flatnonzero(changed), [expected])


def test_every_patch_of_a_clip_sees_every_other(model):
  pixels = normal(1, 4, SIDE, SIDE, 3)
  changed = encode(model, pixels) != encode(model, pixels.at[0, 3, 0, 0, 0].add(1.0))
  assert changed.any(axis=-1).all()


def test_the_last_norm_hardly_bounds_the_variance(patch_by_patch):
  # Patches are chosen so that little is left after the positions are added: features of size
  # 1e-4 have a variance of 1e-8, which an eps of 1e-6 would flatten and 1e-12 does not.
  values = VISION.patch_size**2 * 3
  patch_by_patch.patch_embed.kernel[...] = jnp.eye(values, VISION.width)
  patch_by_patch.patch_embed.bias[...] = jnp.zeros(VISION.width)
  table = position_table(VISION, num_frames=1, grid=VISION.grid_size)
  noise = 1e-4 * np.asarray(normal(PATCHES, VISION.width))
  patches = np.zeros((PATCHES, values), np.float32)
  patches[:, : VISION.width] = noise - table
  grid, size = VISION.grid_size, VISION.patch_size
  pixels = patches.reshape(grid, grid, size, size, 3).transpose(0, 2, 1, 3, 4)
  features = encode(patch_by_patch, jnp.asarray(pixels.reshape(1, 1, SIDE, SIDE, 3)))
  assert_close(features.std(axis=-1), np.ones((1, PATCHES)), absolute=1e-3)


def reference_block(block, x):
  """The block in numpy, in float64."""

  def norm(layer, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    return x * layer.scale[...] + layer.bias[...]

  def linear(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + layer.bias[...]

  h = norm(block.norm1, x) @ np.asarray(block.qkv.kernel[...], np.float64)
  q, k, v = (part.reshape(*x.shape[:-1], VISION.num_heads, -1) for part in np.split(h, 3, axis=-1))
  q = q + block.q_bias[...].reshape(VISION.num_heads, -1)
  v = v + block.v_bias[...].reshape(VISION.num_heads, -1)
  scores = np.einsum("cphd,cshd->chps", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores)
  weights /= weights.sum(axis=-1, keepdims=True)
  x = x + linear(block.proj, np.einsum("chps,cshd->cphd", weights, v).reshape(x.shape))
  hidden = linear(block.fc1, norm(block.norm2, x))
  return x + linear(block.fc2, hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["usual", "of little variance"])
def test_a_block_agrees_with_its_formula_for_features(model, scale):
  graph, weights = nnx.split(model.blocks.stacked)
  block = nnx.merge(graph, jax.tree.map(lambda stacked: stacked[0], weights))
  block.proj.bias[...] *= scale  # else the second norm sees the bias and not the features
  block.v_bias[...] *= scale
  x = normal(2, 9, VISION.width, scale=scale)
  assert_close(block(x), reference_block(block, np.asarray(x, np.float64)), relative=2e-6)


def test_a_clip_is_encoded_alike_alone_and_in_a_batch(model):
  pixels = normal(3, 4, SIDE, SIDE, 3)
  together = encode(model, pixels)
  for clip in range(3):
    assert_close(encode(model, pixels[clip : clip + 1])[0], together[clip], relative=2e-6)


def test_an_image_has_the_positions_of_a_first_frame():
  video = position_table(VISION, num_frames=4, grid=VISION.grid_size)
  image = position_table(VISION, num_frames=1, grid=VISION.grid_size)
  np.testing.assert_array_equal(image, video[:PATCHES])


def test_positions_of_more_frames_and_patches_are_resampled():
  config = dataclasses.replace(VISION, position_frames=2)
  table = position_table(config, num_frames=3, grid=VISION.grid_size)
  first, middle, last = table.reshape(3, PATCHES, -1)
  two = position_table(config, num_frames=2, grid=VISION.grid_size).reshape(2, PATCHES, -1)
  assert_close(np.stack([first, last]), two, absolute=1e-6)
  assert_close(middle, two.mean(axis=0), absolute=1e-6)
  finer = position_table(config, num_frames=2, grid=2 * VISION.grid_size)
  assert finer.shape == (8 * PATCHES, VISION.width)
  assert finer.dtype == np.float32
