"""Dropping visual tokens at inference: batches, padding, and what is read again for a question."""

import dataclasses
import inspect

import numpy as np
import pytest
from flax import nnx

from tests.conftest import quick_jit
from videochat_flash_jax.benchmarks.comparison import random_weights
from videochat_flash_jax.benchmarks.decode import prefill_work
from videochat_flash_jax.data.text.conversation import VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.inference import engine as engine_module
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.conversation import Conversation
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.inference.reading import Prompt
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.testing.dummy import (
  dummy_config,
  dummy_model,
  write_dummy_checkpoint,
  write_dummy_video,
)

NEW_TOKENS = 20
LAYERS, RATIOS = (1, 2), (1.0, 0.5, 0.2)
RANKED = "uniform0_attention"  # the second drop ranks


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
  """Compiles the engine's programs without trying hard."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("encode", "read", "last_queries", "score", "decode"):
      program = getattr(programs, name).__wrapped__
      static = {"graph", "layout", "layers", "layer", "wanted"}
      static &= set(inspect.signature(program).parameters)
      patch.setattr(programs, name, quick_jit(program, static_argnames=static))
    yield


@pytest.fixture(scope="module")
def engine():
  dropout = DropoutConfig(RANKED, LAYERS, RATIOS)
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


@pytest.mark.parametrize("is_shared", [True, False])
def test_each_part_of_the_layers_keeps_its_share_of_the_visual_tokens(engine, is_shared):
  texts, num_visual, prefixes = [range(5, 30), range(5, 12)], np.array([108, 37]), []
  rng = np.random.default_rng(1)
  for count in num_visual[:1] if is_shared else num_visual:
    prefix = Prefix(engine)
    prefix.add_text(np.arange(5, 10))
    prefix.add_visual(rng.standard_normal((count, engine.config.decoder.width), np.float32))
    prefix.settle()
    prefixes.append(prefix)
  num_visual = num_visual[[0, 0]] if is_shared else num_visual
  reading = engine.read([np.array(text) for text in texts], NEW_TOKENS, behind=prefixes)
  for own, behind, ratio in zip(reading.caches, reading.behind, RATIOS, strict=True):
    np.testing.assert_array_equal(own.length[:, 0], [len(text) for text in texts])
    lengths = np.concatenate([cache.length[:, 0] for cache in behind])
    expected = 5 + np.floor(num_visual * ratio)
    np.testing.assert_array_equal(lengths, expected[: len(lengths)])
  assert [len(behind) for behind in reading.behind] == [len(prefixes)] * 2 + [2]


QUESTIONS = ("What colour is the star?", "Where does it go?")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=48, fps=2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  checkpoint = write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))
  return {
    kind: VideoChat.from_pretrained(checkpoint, dropout=DropoutConfig(kind, LAYERS, RATIOS))
    for kind in ("uniform", RANKED)
  }


def ask(seen, question):
  return seen.ask(question, max_new_tokens=24)


def sizes_of(reads):
  """How many tokens each part of the layers reads, at each of its turns."""
  sizes = {}
  for layers, num_tokens in reads:
    sizes.setdefault(layers, []).append(num_tokens)
  reads.clear()
  return sizes


@pytest.mark.parametrize("kind", [pytest.param("uniform", marks=pytest.mark.slow), RANKED])
def test_a_question_is_answered_as_if_all_were_read_anew(chats, path, kind):
  video = chats[kind].watch(path)
  answers = [ask(video, question) for question in QUESTIONS]
  fresh = chats[kind].watch(path)
  fresh.history = [(QUESTIONS[0], answers[0])]
  assert ask(fresh, QUESTIONS[1]) == answers[1]
  video.reset()
  assert ask(video, QUESTIONS[0]) == answers[0]


@pytest.mark.slow
def test_where_nothing_depends_on_the_question_only_what_is_new_is_read(chats, path, reads):
  video = chats["uniform"].watch(path)
  ask(video, QUESTIONS[0])
  sizes_of(reads)
  ask(video, QUESTIONS[1])
  sizes = list(sizes_of(reads).values())
  assert sizes == [sizes[0]] * len(RATIOS) and len(sizes[0]) == 1
  ask(with_history(chats["uniform"].watch(path), video.history[:1]), QUESTIONS[1])
  *_, (_, whole) = reads
  assert sizes[0][0] < whole


def with_history(conversation, history):
  conversation.history = list(history)
  return conversation


def test_only_above_the_choice_by_attention_is_anything_read_again(chats, path, reads):
  engine = chats[RANKED].engine
  video = chats[RANKED].watch(path)
  watched = sizes_of(reads)
  assert list(watched) == engine.shared_parts
  ((num_before,), _) = watched.values()  # the tokens of the video and the text before it
  num_visual = video.num_frames // 4 * engine.config.clip_tokens
  num_kept = num_before - num_visual + int(num_visual * RATIOS[-1])
  own = opening = 0
  for number, question in enumerate(QUESTIONS):
    ask(video, question)
    first, second, ranked = sizes_of(reads).values()
    assert first == second
    if number == 0:  # the opening of all questions is read once, with the video
      opening = first.pop(0)
    (new,) = first
    own += new
    assert ranked == [num_kept + opening, own]


@pytest.mark.parametrize("kind", [pytest.param("uniform", marks=pytest.mark.slow), RANKED])
def test_an_extended_video_reads_what_is_new_and_answers_as_one_watched_whole(chats, reads, kind):
  frames = np.random.default_rng(0).integers(0, 256, (28, 32, 32, 3), dtype=np.uint8)
  whole, grown = chats[kind].watch(frames), chats[kind].watch(frames[:20])
  ask(grown, QUESTIONS[0])
  sizes_of(reads)
  grown.extend(frames[20:])
  first, *_ = sizes_of(reads).values()
  assert first == [8 // 4 * chats[kind].config.clip_tokens]
  grown.reset()
  assert (grown.num_frames, grown.seconds) == (whole.num_frames, whole.seconds)
  assert ask(grown, QUESTIONS[0]) == ask(whole, QUESTIONS[0])


@pytest.mark.slow
def test_text_alone_is_read_once_whatever_is_dropped_elsewhere(chats, reads):
  chat = chats[RANKED]
  conversation = Conversation(chat.engine, chat.tokenizer)
  first = ask(conversation, QUESTIONS[0])
  sizes_of(reads)
  second = ask(conversation, QUESTIONS[1])
  sizes = list(sizes_of(reads).values())
  assert sizes == [sizes[0]] * len(RATIOS) and len(sizes[0]) == 1
  fresh = with_history(Conversation(chat.engine, chat.tokenizer), [(QUESTIONS[0], first)])
  assert ask(fresh, QUESTIONS[1]) == second
  assert sizes[0][0] < reads[0][1]


def test_with_the_models_own_drops_10_000_frames_take_three_fifths_of_the_work(monkeypatch):
  """Counts what is read, with its padding, as products of the 7B's decoder. Nothing is computed."""
  seven = VideoChatFlashConfig.qwen2_7b_res448().decoder
  small = dataclasses.replace(dummy_config().decoder, depth=seven.depth, max_positions=200_000)
  frames = np.zeros((160_000, small.width), np.float32)

  def count(engine, layers, rows, cache, behind=(), *, sizes=None, wanted=""):
    """Counts the work of pieces behind the tokens that the part has read before."""
    nonlocal flops
    of_part = dataclasses.replace(seven, depth=len(layers))
    for _, size in sizes or [(len(rows[0]), 64)]:
      before = read.get(layers, 0)
      read[layers] = before + size
      flops += prefill_work(of_part, before + size).flops - prefill_work(of_part, before).flops
    return cache, [np.zeros((sizes[0][0] if sizes else 64, small.width), np.float32)]

  def rank(engine, layer, own, states):
    """Counts the keys, and their products with the query."""
    nonlocal flops
    flops += (
      2 * len(states) * seven.head_size * (seven.width * seven.num_kv_heads + seven.num_heads)
    )
    return np.random.default_rng(0).random((1, len(states)))

  monkeypatch.setattr(Engine, "read_part", count)
  monkeypatch.setattr(Engine, "_scores", rank)
  works = []
  for dropout in (None, DropoutConfig.model_card()):
    flops, read = 0, {}
    config = dataclasses.replace(dummy_config(), decoder=small, dropout=dropout)

    def model(config=config):
      return VideoChatFlash(config, rngs=nnx.Rngs(0))

    engine = Engine(nnx.merge(*random_weights(model)), stop_ids=(3,))
    prefix = Prefix(engine)
    prefix.expect(len(frames))
    prefix.add_visual(frames)
    prefix.settle()
    engine.read([np.arange(40)], 8, behind=(prefix,))
    works.append(flops)
  assert works[0] == pytest.approx(prefill_work(seven, len(frames)).flops, rel=0.01)  # padding
  assert works[1] / works[0] <= 0.62
