"""Attention to parts of the keys, and its memory; `attention_test.py` tests it for all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close, quick_jit
from videochat_flash_jax.ops import blockwise
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.blockwise import merge

BATCH, LENGTH, KEYS, HEADS, KV_HEADS, HEAD_SIZE = 2, 23, 31, 6, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "_TILE_QUERIES", 12)
  monkeypatch.setattr(blockwise, "_TILE_KEYS", 6)  # 3 in causal order


def random(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def segments(length, starts):
  """Segments [B, length] whose second one begins at a start of its own in each row."""
  return (jnp.arange(length) >= jnp.array(starts)[:, None]).astype(jnp.int32)


QUERY_SEGMENTS, KEY_SEGMENTS = segments(LENGTH, [9, 14]), segments(KEYS, [20, 11])
# In row 1 the second part has no key of the first segment.
PARTS = [slice(0, 12), slice(12, 31)]


@pytest.fixture(scope="module")
def qkv():
  q = random(BATCH, LENGTH, HEADS, HEAD_SIZE, seed=0)
  return q, *(random(BATCH, KEYS, KV_HEADS, HEAD_SIZE, seed=seed) for seed in (1, 2))


def of_part(qkv, keys):
  """Arguments of `attend` for a part of the keys."""
  q, k, v = qkv
  return q, k[:, keys], v[:, keys], False, None, QUERY_SEGMENTS, KEY_SEGMENTS[:, keys]


def test_merged_parts_of_the_keys_are_attention_to_all(qkv):
  weights = random(*qkv[0].shape, seed=3)

  def loss(*qkv):
    segments = {"query_segments": QUERY_SEGMENTS, "key_segments": KEY_SEGMENTS}
    out = attention(*qkv, implementation="dense", **segments)
    return jnp.sum(out * weights), out

  @quick_jit
  def by_parts(*qkv):
    parts = [of_part(qkv, keys) for keys in PARTS]
    merged = merge(*(blockwise.attend(*part) for part in parts))
    return merged, [blockwise.attend_backward(*part, merged, weights) for part in parts]

  (_, out), expected = quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
  merged, gradients = by_parts(*qkv)
  assert_close(merged.out, out, relative=2e-6)
  d_q, d_k, d_v = zip(*gradients, strict=True)
  assert_close(sum(d_q), expected[0], relative=2e-6)
  assert_close(jnp.concatenate(d_k, axis=1), expected[1], relative=2e-6)
  assert_close(jnp.concatenate(d_v, axis=1), expected[2], relative=2e-6)


def test_a_part_that_no_query_sees_changes_nothing(qkv):
  q, k, v, *_ = of_part(qkv, PARTS[0])
  nowhere = jnp.full((BATCH, k.shape[1]), 7)
  unseen = blockwise.attend(q, k, v, False, None, QUERY_SEGMENTS, nowhere)
  np.testing.assert_array_equal(unseen.out, 0)
  np.testing.assert_array_equal(unseen.lse, jnp.float32(blockwise.NOTHING))
  seen = blockwise.attend(*of_part(qkv, PARTS[1]))
  for merged in (merge(seen, unseen), merge(unseen, seen)):
    np.testing.assert_array_equal(merged.out, seen.out)
  np.testing.assert_array_equal(merge(unseen, unseen).out, 0)


def test_bfloat16_is_merged_in_float32(qkv):
  arguments = of_part([x.astype(jnp.bfloat16) for x in qkv], slice(None))
  part = blockwise.attend(*arguments)
  gradients = blockwise.attend_backward(*arguments, part, part.out.astype(jnp.bfloat16))
  assert {x.dtype for x in (*part, *gradients)} == {jnp.dtype("float32")}
  exact = blockwise.attend(*of_part(qkv, slice(None)))
  assert_close(part.out, exact.out, relative=1e-2)


@pytest.mark.parametrize("filled", [1, 2, 3, 4, KEYS - 1])
def test_the_empty_end_of_a_cache_is_not_read(qkv, filled):
  """Tiles have 3 keys: the one that is partly filled is masked, and all later ones are not read."""
  q, k, v = qkv
  end_of_tile = -(-filled // 3) * 3
  dirty_k, dirty_v = (x.at[:, filled:].set(-1e30).at[:, end_of_tile:].set(jnp.nan) for x in (k, v))

  @quick_jit
  def to_filled(q, k, v, filled):
    order = jnp.full((1, LENGTH), filled - 1)
    part = blockwise.attend(q, k, v, True, order, None, None)
    return part, blockwise.attend_backward(q, k, v, True, order, None, None, part, part.out)

  part, gradients = to_filled(q, dirty_k, dirty_v, filled)
  clean, clean_gradients = to_filled(q, k, v, filled)
  for ours, theirs in zip((*part, *gradients), (*clean, *clean_gradients), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  expected = attention(q, k[:, :filled], v[:, :filled], implementation="dense")
  assert_close(part.out, expected, relative=1e-6)


def test_queries_in_order_are_not_multiplied_with_later_tiles(qkv):
  q, k, v = qkv
  clean = blockwise.attend(q, k, v, True, None, None, None)
  # The first two blocks, of 4 queries, end in the third tile of 3 keys.
  k, v = (x.at[:, 9:].set(jnp.nan) for x in (k, v))
  part = blockwise.attend(q, k, v, True, None, None, None)
  np.testing.assert_array_equal(part.out[:, :8], clean.out[:, :8])


def test_queries_of_packed_rows_are_not_multiplied_with_far_segments():
  q, k, v = (random(1, 40, 1, HEAD_SIZE, seed=seed) for seed in range(3))
  segments = jnp.arange(40)[None] // 10
  clean = blockwise.attend(q, k, v, False, None, segments, segments)
  # The third block has queries of the segment of tokens 20 to 29 alone, and tiles have 6 keys.
  k, v = (x.at[:, :18].set(jnp.nan).at[:, 30:].set(jnp.nan) for x in (k, v))
  part = blockwise.attend(q, k, v, False, None, segments, segments)
  np.testing.assert_array_equal(part.out[:, 20:30], clean.out[:, 20:30])


@pytest.mark.parametrize("order", [-1, -100])
def test_a_query_before_all_keys_sees_nothing(qkv, order):
  part = blockwise.attend(*qkv, True, jnp.full((1, LENGTH), order), None, None)
  np.testing.assert_array_equal(part.out, 0)
  np.testing.assert_array_equal(part.lse, jnp.float32(blockwise.NOTHING))


@pytest.mark.parametrize("packed", [False, True])
def test_memory_of_both_passes_grows_with_the_length_and_not_with_its_square(packed):
  def temporaries(length):
    """Bytes of temporary memory for the result and its gradients."""
    shape = jax.ShapeDtypeStruct((1, length, 1, HEAD_SIZE), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None

    def loss(q, k, v, segments):
      attend = functools.partial(attention, causal=True, implementation="blockwise")
      return jnp.sum(attend(q, k, v, query_segments=segments, key_segments=segments) ** 2)

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(shape, shape, shape, segments)
    return program.compile().memory_analysis().temp_size_in_bytes

  short, long = temporaries(2048), temporaries(4096)
  assert 0 < long < 2.2 * short
  assert long < 4096 * 4096 * 4 / 10  # a tenth of the scores
