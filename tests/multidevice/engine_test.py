"""An answer on a mesh is the answer of one device, whatever is split along which axis."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import videochat_flash_jax as vcf
from tests.conftest import assert_close, quick_jit
from videochat_flash_jax.data.text.conversation import VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.engine import Engine, Prompt
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.testing.dummy import (
  dummy_config,
  dummy_model,
  write_dummy_checkpoint,
  write_dummy_video,
)

ONE = "one device"
MESHES = {
  "data 8": MeshConfig(data=8, fsdp=1),
  "data 4 x tensor 2": MeshConfig(data=4, fsdp=1, tensor=2),
  "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2),
  "tensor 2": MeshConfig(fsdp=1, tensor=2),
}
MIXED = "fsdp 4 x tensor 2"
DROPOUT = {
  "off": None,
  "on": DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.2)),
}
NEW_TOKENS = 20
HOT = Sampling(temperature=5.0, top_p=0.9, seed=1)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
  """Compiles the engine's programs without trying hard."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("encode", "prefill", "extend", "decode"):
      static = "num_slots" if name == "prefill" else None
      program = getattr(programs, name).__wrapped__
      patch.setattr(programs, name, quick_jit(program, static_argnames=static))
    yield


def layout_of(name):
  if name == ONE:
    return ONE_DEVICE
  config = MESHES[name]
  num_devices = config.data * config.fsdp * config.tensor
  return Layout(make_mesh(config, jax.devices()[:num_devices]))


@functools.cache
def engine_on(name, dropout="off"):
  config = dataclasses.replace(dummy_config(), dropout=DROPOUT[dropout])
  return Engine(dummy_model(config), (3,), layout_of(name))


@functools.cache
def clips():
  return np.random.default_rng(0).integers(0, 256, (11, 4, 32, 32, 3), dtype=np.uint8)


@functools.cache
def prompts():
  """Rows of different length; one has nothing to see."""
  tokens = np.asarray(engine_on(ONE).encode(clips()))
  rng, rows = np.random.default_rng(1), []
  for num_visual, num_text in ((len(tokens), 25), (36, 40), (0, 12)):
    text = rng.integers(5, 500, num_text).tolist()
    if num_visual:
      text.insert(5, VISUAL_SLOT)
    rows.append(Prompt(*open_slots(text, [num_visual][: num_visual > 0]), tokens[:num_visual]))
  return rows


def questions():
  rng = np.random.default_rng(2)
  nothing = prompts()[-1].visual_tokens
  return [Prompt(*open_slots(rng.integers(5, 500, n).tolist(), []), nothing) for n in (9, 70, 4)]


def written(engine, reading, sampling=Sampling()):
  """Tokens of every row, and the reading behind them."""
  steps = list(engine.write(reading, NEW_TOKENS, sampling))
  return np.concatenate([tokens for tokens, _ in steps], axis=1).tolist(), steps[-1][1]


@functools.cache
def answers_of(name, dropout):
  """Scores and tokens of two turns, and the readings behind them."""
  engine = engine_on(name, dropout)
  first = engine.read(prompts(), NEW_TOKENS)
  scores = [np.asarray(first.logits)[: len(prompts())]]
  answers, first = written(engine, first)
  second = engine.read(questions(), NEW_TOKENS, after=first)
  scores.append(np.asarray(second.logits)[: len(prompts())])
  drawn, second = written(engine, second, HOT)
  return scores, (answers, drawn), second


def test_clips_are_encoded_as_on_one_device():
  tokens = engine_on(MIXED).encode(clips())
  assert tokens.sharding.is_fully_replicated
  assert_close(tokens, engine_on(ONE).encode(clips()), relative=TOLERANCE)


def cases():
  """Every mesh without dropout and with it; only one of several axes, with dropout, is not slow."""
  for name in MESHES:
    for dropout in DROPOUT:
      marks = () if (name, dropout) == (MIXED, "on") else pytest.mark.slow
      yield pytest.param(name, dropout, id=f"{name}, dropout {dropout}", marks=marks)


@pytest.mark.parametrize("name, dropout", list(cases()))
def test_two_turns_are_read_and_answered_as_on_one_device(name, dropout):
  scores, tokens, _ = answers_of(name, dropout)
  expected_scores, expected_tokens, _ = answers_of(ONE, dropout)
  assert tokens == expected_tokens
  assert len({tuple(row) for turn in tokens for row in turn}) == 6  # they do differ
  for ours, theirs in zip(scores, expected_scores, strict=True):
    assert_close(ours, theirs, relative=TOLERANCE)


@pytest.mark.parametrize("dropout", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_a_cache_stays_split_by_rows_and_heads(dropout):
  _, _, reading = answers_of(MIXED, dropout)
  decoder = dummy_config().decoder
  for cache in reading.caches:
    for slots in (cache.k, cache.v):
      shape = (cache.depth, 1, decoder.num_kv_heads // 2, cache.num_slots, decoder.head_size)
      assert {shard.data.shape for shard in slots.addressable_shards} == {shape}
  assert sum(cache.depth for cache in reading.caches) == decoder.depth


def test_a_single_row_is_answered_on_a_mesh_that_splits_rows():
  alone, on_mesh = (engine_on(name).generate(prompts()[:1], NEW_TOKENS) for name in (ONE, MIXED))
  assert on_mesh == alone
  assert len(alone) == 1


@pytest.mark.parametrize(
  "sizes, said",
  [
    ({"sequence": 2}, r"mesh\.sequence is 2.*mesh\.sequence=1"),
    ({"tensor": 4}, r"mesh\.tensor is 4, but \w+ has num_kv_heads 2"),
    ({"tensor": 3, "data": 2}, r"mesh: data 2"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(checkpoint, sizes, said):
  with pytest.raises(vcf.InputError, match=said) as error:
    vcf.VideoChat.from_pretrained(checkpoint, mesh=vcf.MeshConfig(**sizes))
  assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
def test_a_chat_on_a_mesh_answers_as_on_one_device(checkpoint, tmp_path):
  path = write_dummy_video(tmp_path / "a.mp4")
  answers = []
  for mesh in (None, vcf.MeshConfig(tensor=2)):
    chat = vcf.VideoChat.from_pretrained(checkpoint, mesh=mesh)
    video = chat.watch(path, max_frames=4)
    answers.append([video.ask(question, max_new_tokens=8) for question in ("Where?", "And then?")])
  assert answers[0] == answers[1]
