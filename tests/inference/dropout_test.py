"""Dropping visual tokens at inference: batches, buckets, and what a conversation may reuse."""

import dataclasses

import numpy as np
import pytest

from tests.conftest import quick_jit
from videochat_flash_jax.data.text.conversation import VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.inference import engine as engine_module
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.conversation import Conversation
from videochat_flash_jax.inference.engine import Engine, Prompt
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.testing.dummy import (
  dummy_config,
  dummy_model,
  write_dummy_checkpoint,
  write_dummy_video,
)

NEW_TOKENS = 20
LAYERS, RATIOS = (1, 2), (1.0, 0.5, 0.2)


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
  """Compiles the engine's programs without trying hard."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("encode", "prefill", "extend", "decode"):
      static = "num_slots" if name == "prefill" else None
      program = getattr(programs, name).__wrapped__
      patch.setattr(programs, name, quick_jit(program, static_argnames=static))
    yield


@pytest.fixture(scope="module")
def engine():
  dropout = DropoutConfig("uniform0_attention", LAYERS, RATIOS)
  return Engine(dummy_model(dataclasses.replace(dummy_config(), dropout=dropout)), stop_ids=(3,))


@pytest.fixture(scope="module")
def prompts(engine):
  """Two videos of different length, one image, and two rows of text."""
  rng = np.random.default_rng(0)
  side = engine.config.vision.image_size
  rows = []
  for frames, num_text in (((9, 4), 25), ((3, 4), 40), ((5, 1), 12), (None, 12), (None, 70)):
    text = rng.integers(5, 500, num_text).tolist()
    tokens, counts = engine.encode(np.zeros((1, 4, side, side, 3), np.uint8))[:0], []
    if frames is not None:
      tokens = engine.encode(rng.integers(0, 256, (*frames, side, side, 3), dtype=np.uint8))
      text.insert(5, VISUAL_SLOT)
      counts = [len(tokens)]
    rows.append(Prompt(*open_slots(text, counts), tokens))
  return rows


@pytest.fixture(scope="module")
def alone(engine, prompts):
  """Each row's tokens by itself, all padded to one large bucket."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine_module, "bucket", lambda size, smallest=64: 192 if size <= 192 else 256)
    return [engine.generate([prompt], NEW_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
def test_videos_an_image_and_text_in_one_batch_give_the_tokens_they_give_alone(
  engine, prompts, alone, order
):
  together = engine.generate([prompts[row] for row in order], NEW_TOKENS)
  assert together == [alone[row] for row in order]


def test_each_part_of_the_layers_remembers_the_tokens_it_saw(engine, prompts):
  reading = engine.read(prompts, NEW_TOKENS)
  num_visual = np.array([len(prompt.visual_tokens) for prompt in prompts])
  num_text = np.array([len(prompt.token_ids) for prompt in prompts]) - num_visual
  for cache, ratio in zip(reading.caches, RATIOS, strict=True):
    np.testing.assert_array_equal(cache.length, num_text + np.floor(num_visual * ratio))
  slots = [cache.num_slots for cache in reading.caches]
  assert slots[0] > slots[1] >= slots[2]


def test_visual_tokens_are_not_added_to_a_reading_from_which_some_were_dropped(engine, prompts):
  reading = engine.read(prompts, NEW_TOKENS)
  with pytest.raises(ValueError, match="in one call"):
    engine.read(prompts, NEW_TOKENS, after=reading)


QUESTIONS = ("What colour is the star?", "Where does it go?")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=48, fps=2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  checkpoint = write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))
  return {
    kind: VideoChat.from_pretrained(checkpoint, dropout=DropoutConfig(kind, LAYERS, RATIOS))
    for kind in ("uniform", "uniform0_attention")
  }


def ask(seen, question):
  return seen.ask(question, max_new_tokens=24)


@pytest.fixture
def reads(chats, monkeypatch):
  """How many tokens are read for each question, and whether behind what was read before."""
  reads = []
  for chat in chats.values():
    read = chat.engine.read

    def record(prompts, max_new_tokens, *, after=None, read=read):
      reads.append((len(prompts[0].token_ids), after is not None))
      return read(prompts, max_new_tokens, after=after)

    monkeypatch.setattr(chat.engine, "read", record)
  return reads


@pytest.mark.parametrize(
  "kind, may_go_on",
  [pytest.param("uniform", True, marks=pytest.mark.slow), ("uniform0_attention", False)],
)
def test_a_question_is_answered_as_if_all_were_read_anew(chats, path, reads, kind, may_go_on):
  video = chats[kind].watch(path)
  answers = [ask(video, question) for question in QUESTIONS]
  assert [after for _, after in reads] == [False, may_go_on]
  fresh = chats[kind].watch(path)
  fresh.history = [(QUESTIONS[0], answers[0])]
  assert ask(fresh, QUESTIONS[1]) == answers[1]
  video.reset()
  assert ask(video, QUESTIONS[0]) == answers[0]


@pytest.mark.slow
def test_an_extended_video_is_read_anew(chats, path, reads):
  frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
  whole, grown = chats["uniform"].watch(path), chats["uniform"].watch(path)
  ask(grown, QUESTIONS[0])
  for video in (whole, grown):
    video.reset()
    video.extend(frames)
  assert ask(grown, QUESTIONS[0]) == ask(whole, QUESTIONS[0])
  assert not any(after for _, after in reads)


@pytest.mark.slow
def test_text_alone_is_read_once_whatever_is_dropped_elsewhere(chats, reads):
  chat = chats["uniform0_attention"]
  conversation = Conversation(chat.engine, chat.tokenizer)
  for question in QUESTIONS:
    ask(conversation, question)
  assert [after for _, after in reads] == [False, True]
