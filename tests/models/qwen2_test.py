import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import DECODER, fill_randomly, normal
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.qwen2 import Qwen2

TOLERANCE = 2e-5
LENGTH = 12


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))


def embedded(rows=2, length=LENGTH, seed=0):
  return normal(rows, length, DECODER.width, seed=seed)


compute = nnx.jit(Qwen2.__call__)
read = nnx.jit(Qwen2.read, static_argnames=("layers", "is_last_needed"))


def lengths(*numbers):
  return jnp.array(numbers, jnp.int32)


def empty(rows, num_slots, depth=DECODER.depth):
  return KVCache.empty(DECODER, rows, num_slots, depth=depth)


def test_reading_token_by_token_is_reading_all_at_once(model):
  x = embedded()
  whole = compute(model, x)
  hidden, cache = read(model, x, empty(2, LENGTH), lengths(LENGTH, LENGTH))
  assert_close(model.norm(hidden), whole, relative=TOLERANCE)
  hidden, cache = read(model, x[:, :5], empty(2, LENGTH), lengths(5, 5))
  assert_close(model.norm(hidden), whole[:, :5], relative=TOLERANCE)
  for token in range(5, LENGTH):
    hidden, cache = read(model, x[:, token : token + 1], cache, lengths(1, 1))
    assert_close(model.norm(hidden[:, 0]), whole[:, token], relative=TOLERANCE)
  np.testing.assert_array_equal(cache.length, [[LENGTH], [LENGTH]])


def test_padded_chunks_of_rows_of_several_lengths_are_read_as_if_alone(model):
  x, noise = embedded(), embedded(length=4, seed=1)
  whole = compute(model, x)
  chunks = [(3, 4), (4, 1), (1, 3), (4, 4)]  # of the first row and the second
  read_so_far, cache = np.array([0, 0]), empty(2, LENGTH + 4)
  for chunk in chunks:
    padded = noise
    for row, length in enumerate(chunk):
      start = read_so_far[row]
      padded = padded.at[row, :length].set(x[row, start : start + length])
    hidden, cache = read(model, padded, cache, lengths(*chunk))
    for row, length in enumerate(chunk):
      start, last = read_so_far[row], model.norm(hidden[row, :length])
      assert_close(last, whole[row, start : start + length], relative=TOLERANCE)
    read_so_far += chunk
    np.testing.assert_array_equal(cache.length[:, 0], read_so_far)
  assert read_so_far.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("is_shared", [True, False])
def test_rows_behind_caches_are_read_as_if_these_were_their_own(model, is_shared):
  x, before = embedded(), [5, 5] if is_shared else [5, 3]
  x = x.at[1, :5].set(x[0, :5]) if is_shared else x
  whole, behind = compute(model, x), []
  for row in range(1 if is_shared else 2):
    first = x[row : row + 1, : before[row]]
    behind.append(read(model, first, empty(1, 8), lengths(before[row]))[1])
  own = jnp.stack([x[row, start : start + 7] for row, start in enumerate(before)])
  cache = empty(2, 9)
  for chunk in (own[:, :4], own[:, 4:6], own[:, 6:]):
    start, num_tokens = int(cache.length[0, 0]), chunk.shape[1]
    hidden, cache = read(model, chunk, cache, lengths(num_tokens, num_tokens), behind=tuple(behind))
    for row in range(2):
      expected = whole[row, before[row] + start :][:num_tokens]
      assert_close(model.norm(hidden[row]), expected, relative=TOLERANCE)


def test_parts_of_the_layers_read_one_after_another_are_the_whole(model):
  x, num_tokens = embedded(), lengths(LENGTH, 7)
  expected, whole = read(model, x, empty(2, LENGTH), num_tokens)
  caches = []
  for layers in (range(1), range(1, DECODER.depth)):
    x, cache = read(model, x, empty(2, LENGTH, len(layers)), num_tokens, layers=layers)
    caches.append(cache)
  assert_close(x, expected, relative=TOLERANCE)
  for *of_parts, slots in zip(*(cache.stored for cache in caches), whole.stored, strict=True):
    assert_close(jnp.concatenate(of_parts), slots, relative=TOLERANCE)


@pytest.mark.parametrize("layers", [range(DECODER.depth), range(1, DECODER.depth), range(1)])
def test_the_cache_is_the_same_where_what_leaves_the_last_layer_is_not_needed(model, layers):
  x, num_tokens = embedded(), lengths(LENGTH, 7)
  (_, expected), (_, cache) = (
    read(
      model,
      x,
      empty(2, LENGTH, len(layers)),
      num_tokens,
      layers=layers,
      is_last_needed=is_last_needed,
    )
    for is_last_needed in (True, False)
  )
  for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
    assert_close(ours, theirs, relative=TOLERANCE)


def test_what_stands_after_a_token_is_not_seen(model):
  x = embedded()
  changed = compute(model, x.at[:, 7:].set(embedded(seed=1)[:, 7:]))
  np.testing.assert_array_equal(changed[:, :7], compute(model, x)[:, :7])


def test_tokens_are_read_alike_into_a_cache_with_more_slots(model):
  x, token = embedded(), embedded(length=1, seed=1)
  results = []
  for num_slots in (LENGTH + 1, LENGTH + 9):
    hidden, cache = read(model, x, empty(2, num_slots), lengths(LENGTH, 4))
    results.append((hidden[0], hidden[1, :4], read(model, token, cache, lengths(1, 1))[0]))
  for ours, theirs in zip(*results, strict=True):
    assert_close(ours, theirs, relative=TOLERANCE)


def test_packed_conversations_do_not_see_each_other(model):
  x = embedded(rows=1)
  segments = jnp.array([[1] * 5 + [2] * 7])
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  packed = compute(model, x, positions=positions, segment_ids=segments)
  assert_close(packed[:, :5], compute(model, x[:, :5]), relative=TOLERANCE)
  assert_close(packed[:, 5:], compute(model, x[:, 5:]), relative=TOLERANCE)
  other = x.at[:, :5].set(embedded(rows=1, seed=1)[:, :5])
  packed_otherwise = compute(model, other, positions=positions, segment_ids=segments)
  np.testing.assert_array_equal(packed_otherwise[:, 5:], packed[:, 5:])


def test_only_differences_of_positions_matter(model):
  x = embedded()
  positions = jnp.array([[0, 1, 1, 2, 5, 9, 9, 10, 30, 31, 31, 40]])  # repeats and gaps
  near = compute(model, x, positions=positions)
  assert_close(compute(model, x, positions=positions + 100), near, relative=1e-4)
  assert np.abs(near - compute(model, x)).max() > 1e-2


def test_rows_may_have_positions_of_their_own(model):
  x = embedded()
  positions = jnp.stack([jnp.arange(LENGTH), 3 * jnp.arange(LENGTH)])
  both = compute(model, x, positions=positions)
  for row in range(2):
    alone = compute(model, x[row : row + 1], positions=positions[row : row + 1])
    assert_close(alone[0], both[row], relative=TOLERANCE)


def test_ids_below_zero_are_embedded_without_reading_past_the_table(model):
  slots = model.embed(jnp.array([[-200, -100, 3]]))
  np.testing.assert_array_equal(slots[0, :2], jnp.tile(model.embed(jnp.array([[0]]))[0], (2, 1)))
  np.testing.assert_array_equal(slots[:, 2:], model.embed(jnp.array([[3]])))


def test_tied_embeddings_score_with_the_table():
  config = dataclasses.replace(DECODER, tied_embeddings=True)
  model = fill_randomly(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
  assert not hasattr(model, "lm_head")
  hidden = normal(2, 3, config.width)
  table = np.asarray(model.embed(jnp.arange(config.vocab_size)[None])[0])
  assert_close(model.logits(hidden), np.asarray(hidden) @ table.T, relative=1e-6)


def test_bfloat16_weights_give_float32_logits_near_the_exact_ones():
  exact = fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))
  rough = fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  ids = jnp.arange(LENGTH)[None]
  hidden = compute(rough, rough.embed(ids))
  assert hidden.dtype == jnp.bfloat16
  logits = rough.logits(hidden)
  assert logits.dtype == jnp.float32
  assert_close(logits, exact.logits(compute(exact, exact.embed(ids))), relative=0.05)


def test_what_remat_keeps_of_a_layer():
  """ "dots" makes only the two products of attention again, "full" those with seven kernels too."""

  def products(remat):
    def loss(weights, x):
      model = nnx.merge(graph, weights)
      model.layers.remat = remat
      return model(x).sum()

    return str(jax.make_jaxpr(jax.grad(loss))(weights, embedded())).count("dot_general[")

  graph, weights = nnx.split(fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0))))
  assert products("dots") == products("none") + 2
  assert products("full") == products("dots") + 6  # the last product of a layer is its result
