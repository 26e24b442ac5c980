"""Training examples: labels say what the pictures show, and text is written as at inference."""

import numpy as np
import pytest

from videochat_flash_jax.data.text.conversation import inference_prompt, video_opening
from videochat_flash_jax.data.text.tokenizer import train_sentencepiece
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.synthetic import training as synthetic_training
from videochat_flash_jax.synthetic.render import COLOURS
from videochat_flash_jax.synthetic.shapes import KINDS

CONFIG = VideoChatFlashConfig.tiny()
ALL_KINDS = {"attribute": 0.7, "absence": 0.3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  lines = synthetic_training.vocabulary_lines()
  return train_sentencepiece(lines, path, CONFIG.decoder.vocab_size)


def conversation(tokenizer, seed, frames=(8, 32), max_tokens=512, weights=ALL_KINDS):
  rng = np.random.default_rng(seed)
  return synthetic_training.draw_conversation(rng, CONFIG, tokenizer, frames, max_tokens, weights)


def answer_starts(example):
  """Where answers begin: at what is learnt and is the token itself, right before its end."""
  own = (example["labels"] >= 0) & (example["labels"] == example["token_ids"])
  return np.flatnonzero(own[:-1] & own[1:])


def test_patch_labels_name_the_thing_that_covers_the_patch():
  clips = synthetic_training.draw_clips(np.random.default_rng(0), CONFIG, 16)
  grid, patch = CONFIG.vision.grid_size, CONFIG.vision.patch_size
  assert clips["frames"].shape == (16, 4, 32, 32, 3)
  assert clips["kinds"].shape == clips["colours"].shape == (16, 4 * grid * grid)
  patches = clips["frames"].reshape(16, 4, grid, patch, grid, patch, 3).swapaxes(3, 4)
  patches = patches.reshape(16, -1, patch * patch, 3).astype(int)
  shown = (clips["colours"] >= 0) & (clips["colours"] < len(COLOURS))
  assert (shown == ((clips["kinds"] >= 0) & (clips["kinds"] < len(KINDS)))).all()
  palette = np.array(list(COLOURS.values()))
  for pixels, colour in zip(patches[shown], clips["colours"][shown], strict=True):
    assert np.abs(pixels - palette[colour]).sum(axis=-1).min() < 130
  assert 0.1 < shown.mean() < 0.6 and (clips["kinds"] == len(KINDS)).any()


def test_every_word_of_an_answer_is_one_token(tokenizer):
  for word in (*COLOURS, "yes", "no"):
    assert len(tokenizer.encode(word)) == 1
  for word in KINDS:
    assert len(tokenizer.encode(f" {word}")) == 1


def test_the_first_question_is_written_as_at_inference(tokenizer):
  for seed in range(5):
    example = conversation(tokenizer, seed)
    num_frames = 4 * len(example["frames"])
    first_answer = answer_starts(example)[0]
    prompt = example["token_ids"][:first_answer]
    text = tokenizer.decode(prompt[example["visual_index"][:first_answer] < 0])
    question = text.split("from it. ")[1].removesuffix("\nassistant\n")
    ids = inference_prompt(question, tokenizer, video_opening(num_frames, float(num_frames)))
    num_visual = len(example["frames"]) * CONFIG.connector.clip_tokens
    expected_ids, expected_index = open_slots(ids, [num_visual])
    np.testing.assert_array_equal(prompt, expected_ids)
    np.testing.assert_array_equal(example["visual_index"][:first_answer], expected_index)


def test_answers_and_their_ends_are_learnt(tokenizer):
  answers = {*COLOURS, *KINDS, "yes", "no"}
  for seed in range(5):
    example = conversation(tokenizer, seed)
    starts = answer_starts(example)
    assert {tokenizer.decode([token]) for token in example["labels"][starts]} <= answers
    for name in ("labels", "token_ids"):
      assert (example[name][starts + 1] == tokenizer.im_end_id).all()
    np.testing.assert_array_equal(example["labels"][starts], example["token_ids"][starts])


def test_an_answer_has_a_second_label_after_the_name_of_its_thing_and_nowhere_else(tokenizer):
  names = [tokenizer.encode(f" {kind}") for kind in KINDS]
  for seed in range(5):
    example = conversation(tokenizer, seed)
    starts = answer_starts(example)
    early = set(np.flatnonzero(example["labels"] >= 0)) - set(starts) - set(starts + 1)
    assert len(early) == len(starts)
    for index, start in zip(sorted(early), starts, strict=True):
      assert index < start and example["labels"][index] == example["labels"][start]
      assert [example["token_ids"][index - 1]] in names


def test_a_conversation_keeps_to_the_limit_by_asking_less(tokenizer):
  long, short = (conversation(tokenizer, 3, (32, 32), limit) for limit in (512, 240))
  assert len(short["token_ids"]) <= 240 < len(long["token_ids"])
  first = len(short["token_ids"]) - 1
  np.testing.assert_array_equal(short["token_ids"][:first], long["token_ids"][:first])


def test_an_example_depends_on_its_generator_alone(tokenizer):
  one, same, other = (conversation(tokenizer, seed) for seed in (1, 1, 2))
  for name in one:
    np.testing.assert_array_equal(one[name], same[name])
  assert not np.array_equal(one["frames"], other["frames"])
