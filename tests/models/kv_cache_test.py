import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small_models import DECODER, normal
from videochat_flash_jax.models.kv_cache import KVCache

BATCH, NUM_SLOTS = 2, 7
HEADS = (DECODER.num_kv_heads, DECODER.head_size)


@pytest.fixture
def cache():
  empty = KVCache.empty(DECODER, BATCH, NUM_SLOTS, depth=DECODER.depth)
  return empty._replace(length=jnp.array([1, 4]))


def new_tokens(seed):
  return normal(BATCH, 2, *HEADS, seed=seed), normal(BATCH, 2, *HEADS, seed=seed + 1)


def test_tokens_are_written_behind_those_that_count(cache):
  k, v = new_tokens(0)
  cache = cache.write(1, k, v)
  for written, new in zip(cache.read(1), (k, v), strict=True):
    expected = np.zeros((BATCH, NUM_SLOTS, *HEADS), np.float32)
    expected[0, 1:3], expected[1, 4:6] = new
    np.testing.assert_array_equal(written, expected)
  np.testing.assert_array_equal(cache.length, [1, 4])


def test_layers_do_not_write_into_each_other(cache):
  for layer in range(DECODER.depth):
    cache = cache.write(layer, *new_tokens(10 * layer))
  for layer in range(DECODER.depth):
    k, v = new_tokens(10 * layer)
    np.testing.assert_array_equal(cache.read(layer)[0][1, 4:6], k[1])
    np.testing.assert_array_equal(cache.read(layer)[1][0, 1:3], v[0])


def test_a_widened_cache_holds_the_same_tokens(cache):
  cache = cache.write(2, *new_tokens(0))
  wider = cache.widened(9)
  assert (cache.num_slots, wider.num_slots) == (7, 9)
  for before, after in zip(cache.read(2), wider.read(2), strict=True):
    np.testing.assert_array_equal(after, np.pad(before, [(0, 0), (0, 2), (0, 0), (0, 0)]))
