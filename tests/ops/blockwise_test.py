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
  monkeypatch.setattr(blockwise, "_BLOCK_SCORES", 1 << 12)
  monkeypatch.setattr(blockwise, "_BLOCK_QUERIES", 4)


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


def test_queries_in_order_are_not_multiplied_with_all_keys():
  q = jnp.zeros((1, 64, 1, 1))
  spans = list(blockwise._spans(q, q, 4, in_order=True))
  blocks, keys = zip(*spans, strict=True)
  assert [span.stop for span in keys] == [8, 16, 24, 32, 40, 48, 56, 64]
  assert [(span.start, span.stop) for span in blocks] == [(i, i + 2) for i in range(0, 16, 2)]
  assert list(blockwise._spans(q, q, 4, in_order=False)) == [(slice(0, 16), slice(64))]


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
