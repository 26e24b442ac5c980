"""Dropping visual tokens: which stay, and what does not matter for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.models.lettered_rows import CHOICE, config_of, marks, plan_of
from tests.models.small_models import DECODER, fill_randomly, normal
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.token_dropout import (
  EvenDrop,
  before_answer,
  drop_tokens,
  kept_positions,
  ranked_indices,
  segment_positions,
  token_indices,
)

TOLERANCE = 2e-5


def test_the_token_before_an_answer_is_found():
  _, segment_ids, learnt = marks("S ? a a ? a", "A ? a . . .", "S ? A a ? .")
  segment_ids, learnt = jnp.asarray(segment_ids), jnp.asarray(learnt)
  found = np.argwhere(before_answer(segment_ids, learnt)).tolist()
  assert found == [[0, 1], [0, 4], [1, 1]]  # not the last token of a row for its first
  found = np.argwhere(before_answer(segment_ids, None)).tolist()
  assert found == [[0, 5], [1, 2], [2, 1], [2, 4]]


def test_positions_begin_anew_in_each_segment():
  np.testing.assert_array_equal(
    segment_positions(jnp.array([[1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4]])),
    [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]],
  )


def test_what_is_kept_stays_as_far_ahead_of_its_place_as_it_was():
  plan = plan_of(config_of("uniform", (1,), (1.0, 0.5)), "S v v v v ? A ? . .")
  positions = jnp.array([[5, 6, 7, 8, 19, 20, 2, 9, 0, 0]])
  kept = jnp.array([[0, 1, 4, 5, 6, 7, 10]])
  found = kept_positions(plan, kept, positions)
  np.testing.assert_array_equal(found[0, :6], [5, 6, 17, 18, 2, 9])
  np.testing.assert_array_equal(kept_positions(plan, kept, None)[0, :6], [0, 1, 2, 3, 0, 1])


def give(scores):
  """Queries and keys by which the last token attends to the others as `scores` say."""
  keys = jnp.log(jnp.asarray(scores))[..., None, None]
  return lambda x: (jnp.ones((*x.shape[:2], 1, 1)), keys)


def drop_by(scores, row, ratio=0.5):
  plan = plan_of(config_of("attention", (1,), (1.0, ratio)), row)
  x = normal(1, plan.is_visual.shape[1], 3)
  hidden, kept = drop_tokens(plan, plan.drops[1], x, token_indices(plan), give([scores]))
  np.testing.assert_array_equal(hidden[0], x[0, kept[0]])
  return kept[0].tolist()


def test_attention_keeps_those_that_get_most_in_their_order():
  assert drop_by([9.0, 0.1, 0.4, 0.2, 0.3, 1.0], "S v v v v ?") == [0, 2, 4, 5]


def test_of_equal_tokens_the_first_stay():
  assert drop_by([9.0, 0.2, 0.2, 0.2, 0.2, 1.0], "S v v v v ?") == [0, 1, 2, 5]


def test_text_stays_however_little_it_gets():
  assert drop_by([1e-9, 0.1, 1e-9, 0.2, 0.3, 1e-9], "S v ? v v ?", ratio=0.7) == [0, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def model():
  return fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))


@quick_jit
def _read_and_drop(decoder, x, plan, positions):
  return nnx.merge(*decoder).read_and_drop(x, plan, positions=positions)


def read_and_drop(model, x, plan, positions=None):
  return _read_and_drop(nnx.split(model), x, plan, positions)


SAMPLES = (
  "S v v v v v v v v ? a a ? a",
  "S v v v ? v v ? a",
  "S ? ? a",
  "S v v v v v v ?",
  "A ? a",
)


def embedded(num_tokens, seed):
  return normal(num_tokens, DECODER.width, seed=seed)


def padded_batch(samples, width=None):
  width = width or max(len(sample.split()) for sample in samples)
  rows = [embedded(len(sample.split()), SAMPLES.index(sample)) for sample in samples]
  return jnp.stack([jnp.pad(row, ((0, width - len(row)), (0, 0))) for row in rows])


@functools.cache
def alone(training):
  """Hidden states and kept tokens of each sample by itself, all padded alike."""
  model = fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))
  results = []
  for sample in SAMPLES:
    padded = " ".join([*sample.split(), *["."] * 20][:20])
    plan = plan_of(CHOICE, padded, training=training, round_length=lambda _: 20)
    hidden, kept = read_and_drop(model, padded_batch([sample], 20), plan)
    here = kept[0] < len(sample.split())
    results.append((hidden[0][here], kept[0][here]))
  return results


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_a_row_loses_the_same_tokens_alone_and_in_any_batch(model, training, order):
  samples = [SAMPLES[number] for number in order]
  plan = plan_of(CHOICE, *samples, training=training)
  hidden, kept = read_and_drop(model, padded_batch(samples), plan)
  for row, number in enumerate(order):
    expected_hidden, expected_kept = alone(training)[number]
    here = kept[row] < len(SAMPLES[number].split())
    np.testing.assert_array_equal(kept[row][here], expected_kept)
    assert_close(hidden[row][here], expected_hidden, relative=TOLERANCE)


def test_positions_with_jumps_are_those_of_all_layers(model):
  """With drops that drop nothing, hidden states are those without drops at these positions."""
  plan = plan_of(config_of(CHOICE.kind, CHOICE.layers, (1.0, 1.0, 1.0)), SAMPLES[0])
  x = padded_batch(SAMPLES[:1])
  positions = jnp.arange(x.shape[1])[None] + jnp.where(jnp.arange(x.shape[1]) < 6, 5, 90)
  jumping, kept = read_and_drop(model, x, plan, positions)
  np.testing.assert_array_equal(kept[0], np.arange(x.shape[1]))
  assert_close(jumping, model(x, positions=positions), relative=TOLERANCE)
  assert np.abs(jumping - read_and_drop(model, x, plan)[0]).max() > 0.01


def test_packed_samples_lose_the_tokens_they_lose_alone(model):
  rows = (" ".join(SAMPLES[:3]), " ".join([*SAMPLES[3:], ". ."]))
  packed = [
    jnp.concatenate([embedded(len(sample.split()), SAMPLES.index(sample)) for sample in samples])
    for samples in (SAMPLES[:3], SAMPLES[3:])
  ]
  width = len(packed[0])
  x = jnp.stack([jnp.pad(row, ((0, width - len(row)), (0, 0))) for row in packed])
  plan = plan_of(CHOICE, *rows, training=True)
  hidden, kept = read_and_drop(model, x, plan)
  number = 0
  for row, samples in enumerate((SAMPLES[:3], SAMPLES[3:])):
    start = 0
    for sample in samples:
      end = start + len(sample.split())
      here = (kept[row] >= start) & (kept[row] < end)
      expected_hidden, expected_kept = alone(True)[number]
      np.testing.assert_array_equal(kept[row][here] - start, expected_kept)
      assert_close(hidden[row][here], expected_hidden, relative=TOLERANCE)
      start, number = end, number + 1


@pytest.mark.slow
def test_no_gradient_flows_through_the_choice(model):
  x, plan = padded_batch(SAMPLES[:1]), plan_of(config_of("attention"), SAMPLES[0])
  _, first = read_and_drop(model, x, plan._replace(drops={1: plan.drops[1]}))
  _, second = read_and_drop(model, x, plan)
  indices = jnp.searchsorted(first[0], second)
  fixed = plan._replace(drops={1: EvenDrop(first), 2: EvenDrop(indices)})
  graph, weights = nnx.split(model)

  def gradients(plan):
    def total(weights, x):
      return (nnx.merge(graph, weights).read_and_drop(x, plan)[0] ** 3).sum()

    return quick_jit(jax.grad(total, argnums=(0, 1)))(weights, x)

  jax.tree.map(
    lambda a, b: assert_close(a, b, relative=TOLERANCE), gradients(plan), gradients(fixed)
  )


@quick_jit
def read_and_write(decoder, x, read, new):
  """Reads prompts, part after part of the layers, then `new` [tokens, B, D] one by one.

  Args:
    decoder: from `nnx.split`.
    x: embedded prompts.
    read: for each part, indices of the tokens that it reads, in the part before; and their numbers.
    new: embedded.

  Returns:
    The lengths of the caches, and the hidden states of the new tokens.
  """
  decoder = nnx.merge(*decoder)
  caches, parts = [], [range(layer, layer + 1) for layer in range(DECODER.depth)]
  for layers, (indices, num_tokens) in zip(parts, read, strict=True):
    x = jnp.take_along_axis(x, indices[..., None], axis=1)
    cache = KVCache.empty(DECODER, len(x), x.shape[1] + len(new), depth=len(layers))
    x, cache = decoder.read(x, cache, num_tokens, layers=layers)
    caches.append(cache)

  def one_token(caches, x):
    x, longer = x[:, None], []
    for layers, cache in zip(parts, caches, strict=True):
      x, cache = decoder.read(x, cache, jnp.ones(len(x), jnp.int32), layers=layers)
      longer.append(cache)
    return longer, decoder.norm(x[:, 0])

  caches, hidden = jax.lax.scan(one_token, caches, new)
  return [cache.length[:, 0] for cache in caches], hidden.swapaxes(0, 1)


@pytest.mark.slow
def test_decoding_many_tokens_is_reading_all_that_is_left_at_once(model):
  prompts, num_new = SAMPLES[:4], 64
  x, new = padded_batch(prompts), normal(num_new, len(prompts), DECODER.width, seed=9)
  plan = plan_of(CHOICE, *prompts)
  lengths = np.array([len(prompt.split()) for prompt in prompts])
  # From scratch: prompts and new tokens in one row, and at each drop the same tokens stay.
  width = lengths.max() + num_new
  rows = [jnp.concatenate([x[row, :length], new[:, row]]) for row, length in enumerate(lengths)]
  rows = jnp.stack([jnp.pad(row, ((0, width - len(row)), (0, 0))) for row in rows])
  before, drops = [np.arange(length) for length in lengths], {}
  read = [(np.tile(np.arange(x.shape[1]), (len(rows), 1)), lengths)]
  for number in (1, 2):
    first = {layer: plan.drops[layer] for layer in range(1, number + 1)}
    _, kept = read_and_drop(model, x, plan._replace(drops=first))
    after = [np.asarray(row[row < length]) for row, length in zip(kept, lengths, strict=True)]
    indices = np.full((len(rows), max(map(len, after)) + num_new), 10**6, np.int32)
    for row, (was, stays) in enumerate(zip(before, after, strict=True)):
      indices[row, : len(stays)] = np.searchsorted(was, stays)
      indices[row, len(stays) : len(stays) + num_new] = len(was) + np.arange(num_new)
    drops[number], before = EvenDrop(indices), after
    within = np.minimum(indices[:, :-num_new], x.shape[1] - 1)  # any token in the padding
    read.append((within, np.array([len(stays) for stays in after])))
  lengths_after, hidden = read_and_write(nnx.split(model), x, read, new)
  for length, (_, num_read) in zip(lengths_after, read, strict=True):
    np.testing.assert_array_equal(length, num_read + num_new)
  text = plan_of(CHOICE, *[" ".join(["S"] * (length + num_new)) for length in lengths])
  segment_ids = np.minimum(text.segment_ids, 1)
  expected, kept = read_and_drop(model, rows, text._replace(segment_ids=segment_ids, drops=drops))
  for row, length in enumerate(lengths):
    written = (kept[row] >= length) & (kept[row] < length + num_new)
    assert_close(hidden[row], expected[row][written], relative=TOLERANCE)


SCORES = [[0.5, 0.1, 0.4, 0.2, 0.3, 1.0], [1.0, 0.2, 0.2, 0.2, 0.2, 0.1]]


@pytest.mark.parametrize("row", ["S v v v v ?", "S v ? v v ?", "S v v v v v"])
@pytest.mark.parametrize("scores", SCORES)
def test_the_host_ranks_as_the_device_does(row, scores):
  is_visual, _, _ = marks(row)
  plan = plan_of(config_of("attention", (1,), (1.0, 0.5)), row)
  on_host = ranked_indices(np.array(scores, np.float32), is_visual[0], plan.drops[1])
  assert on_host.tolist() == drop_by(scores, row)


def test_bfloat16_weights_drop_as_many_tokens():
  rough = fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  plan = plan_of(CHOICE, *SAMPLES)
  hidden, kept = read_and_drop(rough, padded_batch(SAMPLES).astype(jnp.bfloat16), plan)
  assert hidden.dtype == jnp.bfloat16
  assert np.isfinite(hidden.astype(jnp.float32)).all()
  for row, sample in enumerate(SAMPLES):
    num_visual, length = sample.split().count("v"), len(sample.split())
    assert (kept[row] < length).sum() == length - num_visual + num_visual // 4
