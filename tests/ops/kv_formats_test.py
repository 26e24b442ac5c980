import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops.kv_formats import FORMATS, Int4, Int8, Wide, rotate


def keys_and_values(head_size=32):
  """Keys with a channel that is far larger than the others, as real ones have; and values."""
  rng = np.random.default_rng(0)
  k, v = rng.standard_normal((2, 3, 2, 50, head_size), np.float32)
  k[..., 3] *= 20
  return jnp.asarray(k), jnp.asarray(v)


def unrotated(kept_as, x):
  return rotate(x) if kept_as is Int4 else x


@pytest.mark.parametrize("kept_as, error", [(Wide, 0), (Int8, 1 / 254), (Int4, 1 / 14)])
def test_what_is_kept_comes_back_but_for_the_rounding(kept_as, error):
  pair = keys_and_values()
  decoded = kept_as.encode(*pair).decode(jnp.float32)
  for x, back in zip(pair, decoded, strict=True):
    x = unrotated(kept_as, x)  # rounding is that of what was rotated
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(back - x) <= error * largest * 1.001).all()


@pytest.mark.parametrize("head_size", [16, 24, 32, 128])
def test_a_rotation_keeps_products_and_is_its_own_inverse(head_size):
  k, v = keys_and_values(head_size)
  assert_close(rotate(rotate(k)), k, relative=1e-6)
  products = jnp.sum(rotate(k) * rotate(v), axis=-1)
  assert_close(products, jnp.sum(k * v, axis=-1), relative=1e-5)
  spread = np.abs(rotate(k)).max() / np.abs(rotate(k)).mean()
  assert spread < np.abs(k).max() / np.abs(k).mean()


def test_four_bits_keep_scores_better_when_they_are_rotated():
  k, v = keys_and_values()
  q = jnp.asarray(np.random.default_rng(1).standard_normal(32), jnp.float32)
  rotated, _ = Int4.encode(k, v).decode(jnp.float32)
  plain, _ = Int4.encode(rotate(k), v).decode(jnp.float32)  # rotated twice: not at all
  exact = k @ q
  assert np.abs(rotated @ rotate(q) - exact).mean() < np.abs(plain @ q - exact).mean()


def test_zeros_stay_zeros():
  zeros = jnp.zeros((1, 4, 16))
  for kept_as in FORMATS.values():
    for back in kept_as.encode(zeros, zeros).decode(jnp.float32):
      np.testing.assert_array_equal(back, zeros)


@pytest.mark.parametrize(
  "kept_as, num_bytes", [(Wide, 2 * 2 * 128), (Int8, 2 * 128 + 8), (Int4, 128 + 8)]
)
def test_bytes_of_a_token_and_head_are_those_of_the_table(kept_as, num_bytes):
  like = jax.ShapeDtypeStruct((10, 128), jnp.bfloat16)
  leaves = jax.tree.leaves(jax.eval_shape(kept_as.encode, like, like))
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 10 * num_bytes
