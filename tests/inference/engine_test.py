"""The engine: one row's tokens do not depend on its company, its bucket, or what was cached."""

import numpy as np
import pytest

from videochat_flash_jax.data.text.conversation import VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import engine as engine_module
from videochat_flash_jax.inference import prefix as prefix_module
from videochat_flash_jax.inference.engine import CLIPS_PER_GROUP, Engine
from videochat_flash_jax.inference.prefix import CHUNK, piece_sizes
from videochat_flash_jax.inference.programs import bucket
from videochat_flash_jax.inference.reading import Prompt
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.testing.dummy import dummy_config, dummy_model

NEW_TOKENS = 20


@pytest.fixture(scope="module")
def engine():
  return Engine(dummy_model(), stop_ids=(3,))


@pytest.fixture(scope="module")
def prompts(engine):
  """Rows of different length; the longest one is beyond what dense attention is used for."""
  rng = np.random.default_rng(0)
  rows = []
  for num_clips, num_text in ((3, 25), (1, 60), (0, 12), (2, 700)):
    clips = rng.integers(0, 256, (max(num_clips, 1), 4, 32, 32, 3), dtype=np.uint8)
    tokens = engine.encode(clips)
    text = rng.integers(5, 500, num_text).tolist()
    if num_clips:
      text.insert(5, VISUAL_SLOT)
    counts = [len(tokens)] if num_clips else []
    rows.append(Prompt(*open_slots(text, counts), tokens))
  return rows


@pytest.fixture(scope="module")
def alone(engine, prompts):
  return [engine.generate([prompt], NEW_TOKENS)[0] for prompt in prompts]


def test_a_row_gives_the_same_tokens_alone_and_in_a_batch(engine, prompts, alone):
  assert engine.generate(prompts, NEW_TOKENS) == alone
  assert engine.generate(prompts[::-1], NEW_TOKENS) == alone[::-1]
  assert len({tuple(tokens) for tokens in alone}) == len(prompts)  # the rows do differ


def test_two_runs_give_the_same_tokens(engine, prompts, alone):
  assert engine.generate([prompts[0]], NEW_TOKENS)[0] == alone[0]


def test_another_padding_gives_the_same_tokens(engine, prompts, alone, monkeypatch):
  for module in (engine_module, prefix_module):
    monkeypatch.setattr(module, "bucket", lambda size, smallest=64: 2 * bucket(size))
  monkeypatch.setattr(prefix_module, "_SMALL_CHUNKS", (256, 32))
  assert engine.generate(prompts, NEW_TOKENS) == alone


def test_chunks_of_any_size_give_the_same_tokens(engine, prompts, alone, monkeypatch):
  monkeypatch.setattr(prefix_module, "CHUNK", 16)
  monkeypatch.setattr(prefix_module, "_SMALL_CHUNKS", (8, 4))
  assert engine.generate(prompts, NEW_TOKENS) == alone


def test_a_text_read_in_two_parts_gives_the_same_tokens(engine, prompts, alone):
  text = prompts[2].token_ids
  for cut in (1, 5, len(text) - 1):
    reading = engine.read([text[:cut]], NEW_TOKENS)
    reading = engine.read([text[cut:]], NEW_TOKENS, after=reading)
    assert engine.answers(reading, NEW_TOKENS) == [alone[2]]


def test_caches_grow_when_a_later_turn_needs_more_room(engine, prompts):
  texts = [prompts[i].token_ids for i in (2, 3)]
  reading = engine.read(texts[:1], 1)
  small = reading.caches[0].num_slots
  reading = engine.read(texts[1:], 200, after=reading)
  assert reading.caches[0].num_slots > small
  assert reading.lengths.tolist() == [sum(map(len, texts))]


def test_pieces_cover_all_tokens_and_have_few_sizes():
  for num_tokens in (1, 64, 65, 512, 4095, 4096, 5000, 12345):
    pieces = piece_sizes(num_tokens)
    assert sum(length for length, _ in pieces) == num_tokens
    assert all(length == size for length, size in pieces[:-1])
    assert {size for _, size in pieces} <= {64, 512, CHUNK}


def test_writing_stops_at_the_stop_token(engine, prompts, alone):
  stop = alone[0][7]
  first = alone[0].index(stop)
  model = dummy_model()
  assert Engine(model, stop_ids=(stop,)).generate([prompts[0]], NEW_TOKENS)[0] == alone[0][:first]


def test_at_most_the_wanted_number_of_tokens_is_written(engine, prompts, alone):
  for wanted in (1, 16, 17):
    assert engine.generate([prompts[0]], wanted)[0] == alone[0][:wanted]


def test_sampling_is_repeatable_and_differs_between_seeds(engine, prompts):
  hot = [Sampling(temperature=5.0, seed=seed) for seed in (1, 1, 2)]
  first, again, other = (engine.generate([prompts[0]], NEW_TOKENS, s)[0] for s in hot)
  assert first == again != other


def test_clips_are_encoded_alike_in_any_group(engine):
  clips = np.random.default_rng(1).integers(
    0, 256, (CLIPS_PER_GROUP + 3, 4, 32, 32, 3), dtype=np.uint8
  )
  together = np.asarray(engine.encode(clips))
  apart = np.concatenate([np.asarray(engine.encode(clips[i : i + 1])) for i in range(len(clips))])
  np.testing.assert_array_equal(together, apart)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine, prompts):
  available = dummy_config().decoder.max_positions
  with pytest.raises(InputError, match=f"{len(prompts[0].token_ids)} tokens.*{available}"):
    engine.generate(prompts[:1], available)


def test_buckets_waste_at_most_half():
  sizes = np.arange(1, 5000)
  buckets = np.array([bucket(int(size)) for size in sizes])
  assert (buckets >= sizes).all()
  assert (buckets[64:] <= 1.5 * sizes[64:]).all()
  assert len(set(buckets.tolist())) < 16
