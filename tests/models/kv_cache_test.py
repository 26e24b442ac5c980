import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from tests.models.small_models import DECODER, normal
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.ops.attention import attention

BATCH, NUM_SLOTS = 2, 7
HEADS = (DECODER.num_kv_heads, DECODER.head_size)


@pytest.fixture
def cache():
  empty = KVCache.empty(DECODER, BATCH, NUM_SLOTS, depth=DECODER.depth)
  return empty._replace(length=jnp.array([[1], [4]]))


def new_tokens(seed):
  return normal(BATCH, 2, *HEADS, seed=seed), normal(BATCH, 2, *HEADS, seed=seed + 1)


def test_tokens_are_written_behind_those_that_count(cache):
  k, v = new_tokens(0)
  cache = cache.write(1, k, v)
  for written, new in zip(cache.read(1, k.dtype), (k, v), strict=True):
    expected = np.zeros((BATCH, NUM_SLOTS, *HEADS), np.float32)
    expected[0, 1:3], expected[1, 4:6] = new
    np.testing.assert_array_equal(written, expected)
  np.testing.assert_array_equal(cache.length, [[1], [4]])


def test_layers_do_not_write_into_each_other(cache):
  for layer in range(DECODER.depth):
    cache = cache.write(layer, *new_tokens(10 * layer))
  for layer in range(DECODER.depth):
    k, v = new_tokens(10 * layer)
    written = cache.read(layer, k.dtype)
    np.testing.assert_array_equal(written[0][1, 4:6], k[1])
    np.testing.assert_array_equal(written[1][0, 1:3], v[0])


def test_a_widened_cache_holds_the_same_tokens_and_the_old_one_is_freed(cache):
  cache = cache.write(2, *new_tokens(0))
  slots_before = [np.asarray(slots) for slots in cache.read(2, jnp.float32)]
  wider = cache.widened(9)
  assert wider.num_slots == 9
  for before, after in zip(slots_before, wider.read(2, jnp.float32), strict=True):
    np.testing.assert_array_equal(after, np.pad(before, [(0, 0), (0, 2), (0, 0), (0, 0)]))
  assert all(slots.is_deleted() for slots in cache.stored)


def test_a_widened_cache_is_tied_to_a_device_only_if_it_was(cache):
  copied = jax.tree.map(jnp.copy, cache.stored)
  tied = cache._replace(stored=jax.device_put(copied, jax.devices()[0]))
  for before, is_tied in ((cache, False), (tied, True)):
    assert all(x.committed == is_tied for x in jax.tree.leaves(before.widened(9).stored))


def filled(*length, seed=0):
  """A cache of one layer; the slots behind those that count have other tokens."""
  k, v = (normal(len(length), NUM_SLOTS, *HEADS, seed=seed + i) for i in range(2))
  empty = KVCache.empty(DECODER, len(length), NUM_SLOTS, depth=1)
  return empty.write(0, k, v)._replace(length=jnp.array(length)[:, None])


@pytest.mark.parametrize("num_behind", [1, BATCH])
def test_rows_see_the_tokens_that_they_stand_behind_and_their_own(num_behind):
  behind = tuple(filled(length, seed=10 * length) for length in (5, 2)[:num_behind])
  q, new = normal(BATCH, 2, DECODER.num_heads, DECODER.head_size, seed=7), new_tokens(8)
  out, own = filled(1, 4).attend(0, q, *new, behind=behind)
  for row, num_own in enumerate(own.length[:, 0]):
    before = behind[row % num_behind]
    ((num_before,),) = before.length
    seen = [
      jnp.concatenate([first[:, :num_before], slots[row : row + 1, : num_own + 2]], axis=1)
      for first, slots in zip(before.read(0, q.dtype), own.read(0, q.dtype), strict=True)
    ]
    order = num_before + num_own + jnp.arange(2)[None]
    expected = attention(q[row : row + 1], *seen, causal=True, query_order=order)
    assert_close(out[row : row + 1], expected, relative=1e-5)
    np.testing.assert_array_equal(own.positions(2, behind)[row], order[0])
