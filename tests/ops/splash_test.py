"""The kernel is interpreted on the CPU here; `make test-tpu` compiles it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close, quick_jit
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.ops import blockwise, splash
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.blockwise import Partial, merge

BATCH, HEAD_SIZE = 2, 8
LENGTH, KEYS = 300, 420  # three and four blocks, the last of each not full


@pytest.fixture(autouse=True)
def interpreted_in_small_blocks(monkeypatch):
  monkeypatch.setattr(splash, "_INTERPRET", True)
  monkeypatch.setattr(splash, "_BLOCK", 128)


def random(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(num_heads=4, num_kv_heads=2, keys=KEYS):
  q = random(BATCH, LENGTH, num_heads, HEAD_SIZE, seed=0)
  k, v = (random(BATCH, keys, num_kv_heads, HEAD_SIZE, seed=seed) for seed in (1, 2))
  return q, k, v


def segments_of(lengths):
  return jnp.stack([jnp.repeat(jnp.arange(len(row)), np.array(row)) for row in lengths])


SHARDED = np.concatenate([np.arange(64, 214), np.arange(250, 400)])  # two chunks, as in a zigzag
CASES = {
  "in order": {"causal": True},
  "behind a cache": {"causal": True, "query_order": jnp.array([[90], [7]]) + jnp.arange(LENGTH)},
  "a shard": {"causal": True, "query_order": jnp.asarray(SHARDED)[None]},
  "a packed shard": {
    "causal": True,
    "query_order": jnp.asarray(SHARDED)[None],
    "key_segments": segments_of([[130, 290], [1, 299, 120]]),
    "query_segments": segments_of([[130, 290], [1, 299, 120]])[:, SHARDED],
  },
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_no_query_sees_are_skipped_and_nothing_else(case):
  q, k, v = operands()
  weights = random(*q.shape, seed=3)

  def result_and_gradients(implementation):
    def loss(q, k, v):
      out = attention(q, k, v, implementation=implementation, **CASES[case])
      return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients

  for ours, dense in zip(
    result_and_gradients("splash"), result_and_gradients("dense"), strict=True
  ):
    assert_close(ours, dense, relative=5e-6)


def test_tables_skip_blocks_as_the_worked_example_does():
  tables = splash._tables(jnp.arange(2, 6), length=4, num_keys=8, block=2, block_keys=2)
  for table in tables:
    np.testing.assert_array_equal(table.block_mask, [[[1, 1, 0, 0], [1, 1, 1, 0]]])
  results, _, keys = tables
  # Fetched while skipping: the first keys, for the next queries; the first queries for the keys.
  np.testing.assert_array_equal(results.data_next, [[[0, 1, 0, 0], [0, 1, 2, 0]]])
  np.testing.assert_array_equal(keys.data_next, [[[0, 0, 1, 0], [1, 1, 1, 0]]])


@pytest.mark.parametrize("causal", [True, False], ids=["diagonal", "full"])
def test_a_part_of_the_keys_gives_its_part_of_result_and_gradients(causal):
  q, k, v = operands(num_heads := 6, num_kv_heads=2, keys=LENGTH if causal else KEYS)
  query_segments = segments_of([[100, 200], [40, 160, 100]])
  # Of the full part, the second row's first 40 queries see no key.
  key_segments = query_segments if causal else segments_of([[250, 170], [0, 300, 120]])
  arguments = q, k, v, causal, None, query_segments, key_segments
  ours, theirs = (
    jax.jit(module.attend, static_argnums=3)(*arguments) for module in (splash, blockwise)
  )
  assert_close(ours.out, theirs.out, relative=2e-6)
  assert_close(np.maximum(ours.lse, -1e3), np.maximum(theirs.lse, -1e3), relative=2e-6)
  unseen = np.asarray(theirs.lse) == blockwise.NOTHING
  assert unseen.sum() == (0 if causal else 40 * num_heads)
  assert np.array_equal(ours.lse == blockwise.NOTHING, unseen)

  # Gradients of this part follow from the result over all keys: other parts are seen, too.
  elsewhere = Partial(random(*q.shape, seed=4), random(*q.shape[:3], seed=5).at[1, :20].set(-1e30))
  merged, gradient = merge(theirs, elsewhere), random(*q.shape, seed=6)
  gradients = (
    jax.jit(module.attend_backward, static_argnums=3)(*arguments, merged, gradient)
    for module in (splash, blockwise)
  )
  for ours, theirs in zip(*gradients, strict=True):
    assert_close(ours, theirs, relative=5e-6)


def test_bfloat16_is_merged_in_float32():
  q, k, v = (x[:1, :100].astype(jnp.bfloat16) for x in operands())

  @quick_jit
  def both_passes(q, k, v):
    arguments = q, k, v, False, None, None, None
    part = splash.attend(*arguments)
    return part, splash.attend_backward(*arguments, part, part.out)

  part, gradients = both_passes(q, k, v)
  assert {x.dtype for x in (*part, *gradients)} == {jnp.dtype("float32")}
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="dense")
  assert_close(part.out, exact, relative=1e-2)


def test_more_tokens_than_a_core_has_tables_for_give_an_error_of_one_line():
  shape = jax.ShapeDtypeStruct((1, 1 << 20, 2, HEAD_SIZE), jnp.bfloat16)
  attend = functools.partial(attention, causal=True, implementation="splash")
  with pytest.raises(InputError, match=r"^1048576 tokens .* too many .* mesh\.sequence"):
    jax.eval_shape(attend, shape, shape, shape)
