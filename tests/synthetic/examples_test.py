"""The synthetic world as a mixture: packed, saved and begun again in the same way."""

import functools
import itertools
import json

import numpy as np
import pytest

from tests.data.batches.saved_batches import digest
from videochat_flash_jax.data.batches.data_config import DataConfig, ExampleConfig
from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.synthetic import training as synthetic_training
from videochat_flash_jax.synthetic.examples import synthetic_batches
from videochat_flash_jax.synthetic.render import COLOURS
from videochat_flash_jax.synthetic.shapes import KINDS

MODEL = VideoChatFlashConfig.tiny()
CLIP_TOKENS, SIZE = MODEL.connector.clip_tokens, MODEL.vision.image_size
QUESTIONS = {"attribute": 0.8, "absence": 0.2}


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  lines = synthetic_training.vocabulary_lines()
  train_sentencepiece(lines, path, MODEL.decoder.vocab_size)
  return functools.partial(SentencePieceTokenizer, path)


def batches(make_tokenizer, workers=0, streams=1, questions=QUESTIONS, row_shape=None, **example):
  sizes = {"tokens": 512, "clip_tokens": CLIP_TOKENS, "clips_per_shard": 12}
  row_shape = RowShape(**sizes | (row_shape or {}))
  example = ExampleConfig(image_size=SIZE, **{"frames": (4, 16)} | example)
  config = DataConfig(example, row_shape, rows=2, seed=5, streams=streams, workers=workers)
  return iter(synthetic_batches(config, MODEL, make_tokenizer, questions))


SHARDED = {"num_shards": 2, "zigzag": True}


@pytest.mark.parametrize("row_shape", [{}, SHARDED], ids=["whole rows", "zigzag"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_saved_state_goes_on_exactly_whoever_reads(make_tokenizer, workers, row_shape):
  run, states, digests = batches(make_tokenizer, row_shape=row_shape), [], []
  for _ in range(6):
    states.append(json.loads(json.dumps(run.get_state())))
    digests.append(digest(next(run)))
  again = batches(make_tokenizer, workers, row_shape=row_shape)
  again.set_state(states[3])
  assert [digest(next(again)) for _ in range(3)] == digests[3:]
  again.close()


def test_rows_hold_the_drawn_conversations_behind_one_another(make_tokenizer):
  run = batches(make_tokenizer)
  for batch in itertools.islice(run, 3):
    packed = run.get_state()["streams"]["0"]["last"]
    for row, numbers in enumerate(packed):
      segments = batch["segment_ids"][row]
      assert segments.max() == len(numbers) >= 1
      for segment, number in enumerate(numbers, start=1):
        rng = np.random.default_rng([5, 0, number])
        drawn = synthetic_training.draw_conversation(
          rng, MODEL, make_tokenizer(), (4, 16), 512, QUESTIONS
        )
        for name in ("token_ids", "labels"):
          np.testing.assert_array_equal(batch[name][row][segments == segment], drawn[name])
        visual = batch["visual_index"][row][segments == segment]
        clips = np.unique(visual[visual >= 0] // CLIP_TOKENS)
        np.testing.assert_array_equal(batch["frames"][row][clips], drawn["frames"])


def test_streams_have_examples_of_their_own(make_tokenizer):
  batch = next(batches(make_tokenizer, streams=2))
  assert not np.array_equal(batch["token_ids"][0], batch["token_ids"][1])


def test_a_caption_names_colour_and_kind_of_all_that_is_shown(make_tokenizer):
  tokenizer = make_tokenizer()
  batch = next(batches(make_tokenizer, frames=(4, 4), template="plain"))
  learnt = (batch["segment_ids"][0] == 1) & (batch["visual_index"][0] < 0)
  np.testing.assert_array_equal(batch["labels"][0][learnt], batch["token_ids"][0][learnt])
  caption = tokenizer.decode(batch["token_ids"][0][learnt])
  assert caption.endswith("\n")
  for thing in caption[:-1].split(", "):
    colour, kind = thing.split(" ", 1)
    assert colour in COLOURS and kind in KINDS


@pytest.mark.parametrize(
  "change, said",
  [
    ({"frames": (4, 128)}, "need 32 clips and 832 tokens, but a row has room for 12 and 512"),
    ({"frames": (4, 64)}, "need 16 clips and 448 tokens, but a row has room for 12 and 512"),
    ({"questions": {"colour": 1.0}}, "weights, 0 or more, for attribute, absence"),
    ({"questions": {"absence": 0.0}}, "one of them must be above 0"),
  ],
)
def test_what_cannot_be_drawn_is_refused_at_once(make_tokenizer, change, said):
  with pytest.raises(InputError, match=said):
    batches(make_tokenizer, **change)


def test_a_part_of_a_row_with_too_little_room_is_named(make_tokenizer):
  run = batches(make_tokenizer, row_shape={"num_shards": 4, "clips_per_shard": 1})
  with pytest.raises(InputError, match="clips in a part of a row, but clips_per_shard is 1"):
    list(itertools.islice(run, 20))


def test_a_state_of_other_questions_is_refused(make_tokenizer):
  state = batches(make_tokenizer).get_state()
  with pytest.raises(InputError, match="made with questions"):
    batches(make_tokenizer, questions={"attribute": 1.0}).set_state(state)
