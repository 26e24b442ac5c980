import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import DECODER, fill_randomly, normal
from videochat_flash_jax.models.qwen2 import Qwen2

TOLERANCE = 2e-5
LENGTH = 12


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))


def embedded(rows=2, length=LENGTH, seed=0):
  return normal(rows, length, DECODER.width, seed=seed)


read = nnx.jit(Qwen2.__call__)
prefill = nnx.jit(Qwen2.prefill, static_argnums=3)
extend = nnx.jit(Qwen2.extend)


def lengths(*numbers):
  return jnp.array(numbers, jnp.int32)


def test_reading_token_by_token_is_reading_all_at_once(model):
  x = embedded()
  whole = read(model, x)
  hidden, cache = prefill(model, x[:, :5], lengths(5, 5), LENGTH)
  assert_close(hidden, whole[:, :5], relative=TOLERANCE)
  for token in range(5, LENGTH):
    hidden, cache = extend(model, x[:, token : token + 1], cache, lengths(1, 1))
    assert_close(hidden[:, 0], whole[:, token], relative=TOLERANCE)
  np.testing.assert_array_equal(cache[0].length, [LENGTH, LENGTH])


def test_padded_chunks_of_rows_of_several_lengths_are_read_as_if_alone(model):
  x, noise = embedded(), embedded(length=4, seed=1)
  whole = read(model, x)
  chunks = [(3, 4), (4, 1), (1, 3), (4, 4)]  # of the first row and the second
  read_so_far = np.array([0, 0])
  for number, chunk in enumerate(chunks):
    padded = noise
    for row, length in enumerate(chunk):
      start = read_so_far[row]
      padded = padded.at[row, :length].set(x[row, start : start + length])
    if number == 0:
      hidden, cache = prefill(model, padded, lengths(*chunk), LENGTH + 4)
    else:
      hidden, cache = extend(model, padded, cache, lengths(*chunk))
    for row, length in enumerate(chunk):
      start = read_so_far[row]
      assert_close(hidden[row, :length], whole[row, start : start + length], relative=TOLERANCE)
    read_so_far += chunk
    np.testing.assert_array_equal(cache[0].length, read_so_far)
  assert read_so_far.tolist() == [LENGTH, LENGTH]


def test_what_stands_after_a_token_is_not_seen(model):
  x = embedded()
  changed = read(model, x.at[:, 7:].set(embedded(seed=1)[:, 7:]))
  np.testing.assert_array_equal(changed[:, :7], read(model, x)[:, :7])


def test_a_prompt_is_read_alike_in_a_longer_cache(model):
  x = embedded()
  hidden, cache = prefill(model, x, lengths(LENGTH, 4), LENGTH + 1)
  longer_hidden, longer = prefill(model, x, lengths(LENGTH, 4), LENGTH + 9)
  np.testing.assert_array_equal(hidden, longer_hidden)
  token = embedded(length=1, seed=1)
  after, _ = extend(model, token, cache, lengths(1, 1))
  longer_after, _ = extend(model, token, longer, lengths(1, 1))
  assert_close(longer_after, after, relative=TOLERANCE)


def test_packed_conversations_do_not_see_each_other(model):
  x = embedded(rows=1)
  segments = jnp.array([[1] * 5 + [2] * 7])
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  packed = read(model, x, positions=positions, segment_ids=segments)
  assert_close(packed[:, :5], read(model, x[:, :5]), relative=TOLERANCE)
  assert_close(packed[:, 5:], read(model, x[:, 5:]), relative=TOLERANCE)
  other = x.at[:, :5].set(embedded(rows=1, seed=1)[:, :5])
  packed_otherwise = read(model, other, positions=positions, segment_ids=segments)
  np.testing.assert_array_equal(packed_otherwise[:, 5:], packed[:, 5:])


def test_only_differences_of_positions_matter(model):
  x = embedded()
  positions = jnp.array([[0, 1, 1, 2, 5, 9, 9, 10, 30, 31, 31, 40]])  # repeats and gaps
  near = read(model, x, positions=positions)
  assert_close(read(model, x, positions=positions + 100), near, relative=1e-4)
  assert np.abs(near - read(model, x)).max() > 1e-2


def test_rows_may_have_positions_of_their_own(model):
  x = embedded()
  positions = jnp.stack([jnp.arange(LENGTH), 3 * jnp.arange(LENGTH)])
  both = read(model, x, positions=positions)
  for row in range(2):
    alone = read(model, x[row : row + 1], positions=positions[row : row + 1])
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
  hidden = read(rough, rough.embed(ids))
  assert hidden.dtype == jnp.bfloat16
  logits = rough.logits(hidden)
  assert logits.dtype == jnp.float32
  assert_close(logits, exact.logits(read(exact, exact.embed(ids))), relative=0.05)


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
