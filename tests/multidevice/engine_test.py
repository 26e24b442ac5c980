"""An answer on a mesh is the answer of one device, whatever is split along which axis."""

import collections
import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest

import videochat_flash_jax as vcf
from tests.conftest import assert_close, quick_jit
from videochat_flash_jax.inference import prefix as prefixes
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.prefix import Prefix
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
  "sequence 4 x tensor 2": MeshConfig(fsdp=1, sequence=4, tensor=2),
  "fsdp 2 x sequence 2 x tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
  "tensor 2": MeshConfig(fsdp=1, tensor=2),
}
MIXED = "sequence 4 x tensor 2"
DROPOUT = {
  "off": None,
  "on": DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.2)),
}
NEW_TOKENS = 20
HOT = Sampling(temperature=5.0, top_p=0.9, seed=1)
TOLERANCE = 1e-5
SLOTS = 512  # of the first caches of the video that grows
PIECES = (7, 61, 500, 30)  # of it; only the second and the third have tokens for each of 4 devices


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


def layout_of(name):
  if name == ONE:
    return ONE_DEVICE
  config = MESHES[name]
  num_devices = config.data * config.fsdp * config.sequence * config.tensor
  return Layout(make_mesh(config, jax.devices()[:num_devices]))


@functools.cache
def engine_on(name, dropout="off"):
  config = dataclasses.replace(dummy_config(), dropout=DROPOUT[dropout])
  return Engine(dummy_model(config), (3,), layout_of(name))


@functools.cache
def clips():
  return np.random.default_rng(0).integers(0, 256, (11, 4, 32, 32, 3), dtype=np.uint8)


@functools.cache
def visual_tokens():
  return engine_on(ONE).encode(clips())


def prefix_on(engine, num_visual):
  prefix = Prefix(engine)
  prefix.add_text(np.arange(5, 10))
  prefix.add_visual(visual_tokens()[:num_visual])
  prefix.settle()
  return prefix


def questions(*lengths):
  rng = np.random.default_rng(1)
  return [rng.integers(5, 500, length) for length in lengths]


def written(engine, reading, sampling=Sampling()):
  """Tokens of every row, and the reading behind them."""
  steps = list(engine.write(reading, NEW_TOKENS, sampling))
  return np.concatenate([tokens for tokens, _ in steps], axis=1).tolist(), steps[-1][1]


@functools.cache
def answers_of(name, dropout):
  """Scores and tokens of several rows behind one video, of two turns, and of a video for each row.

  Also the reading behind the second turn.
  """
  engine = engine_on(name, dropout)
  prefix = prefix_on(engine, 132)
  first = engine.read(questions(25, 40, 12), NEW_TOKENS, behind=[prefix])
  scores = [np.asarray(first.logits)]
  tokens, first = written(engine, first)
  second = engine.read(questions(9, 70, 4), NEW_TOKENS, behind=[prefix], after=first)
  scores.append(np.asarray(second.logits))
  drawn, second = written(engine, second, HOT)
  behind = [prefix_on(engine, num_visual) for num_visual in (36, 132)]
  each = engine.read(questions(30, 10), NEW_TOKENS, behind=behind)
  scores.append(np.asarray(each.logits))
  return scores, (tokens, drawn, written(engine, each)[0]), second


def test_clips_are_encoded_as_on_one_device():
  assert_close(engine_on(MIXED).encode(clips()), visual_tokens(), relative=TOLERANCE)


def cases():
  """Every mesh without dropout and with it; only one of several axes, with dropout, is not slow."""
  for name in MESHES:
    for dropout in DROPOUT:
      marks = () if (name, dropout) == (MIXED, "on") else pytest.mark.slow
      yield pytest.param(name, dropout, id=f"{name}, dropout {dropout}", marks=marks)


@pytest.mark.parametrize("name, dropout", list(cases()))
def test_questions_are_read_and_answered_as_on_one_device(name, dropout):
  scores, tokens, _ = answers_of(name, dropout)
  expected_scores, expected_tokens, _ = answers_of(ONE, dropout)
  assert tokens == expected_tokens
  assert len({tuple(row) for turn in tokens for row in turn}) > 5  # they do differ
  for ours, theirs in zip(scores, expected_scores, strict=True):
    assert_close(ours, theirs, relative=TOLERANCE)


@pytest.mark.parametrize("dropout", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_caches_stay_split_by_heads_and_those_of_videos_by_slots(dropout):
  _, _, reading = answers_of(MIXED, dropout)
  decoder = dummy_config().decoder
  behind = [cache for part in reading.behind for cache in part]
  own = [(cache, 3, cache.num_slots) for cache in reading.caches]
  for cache, rows, num_slots in own + [(cache, 1, cache.num_slots // 4) for cache in behind]:
    for slots in cache.stored:
      shape = (cache.depth, rows, decoder.num_kv_heads // 2, num_slots, decoder.head_size)
      assert {shard.data.shape for shard in slots.addressable_shards} == {shape}
  assert sum(cache.depth for cache in reading.caches) == decoder.depth


@functools.cache
def grown(name, dropout, cache):
  """What is answered behind a video after each of its pieces, first about all that was asked.

  Also, after each piece, the bytes of its caches on each device.
  """
  config = dataclasses.replace(dummy_config(), dropout=DROPOUT[dropout])
  engine = Engine(dummy_model(config), (3,), layout_of(name), cache)
  visual = np.random.default_rng(2).standard_normal((sum(PIECES), config.decoder.width), np.float32)
  answers, num_bytes = [], []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prefixes, "CHUNK", SLOTS)
    prefix = Prefix(engine)
    prefix.add_text(np.arange(5, 10))
    for piece in np.split(visual, np.cumsum(PIECES)[:-1]):
      prefix.add_visual(piece)
      prefix.settle()
      reading = engine.read(questions(25), NEW_TOKENS, behind=[prefix])
      answer, reading = written(engine, reading)
      again = engine.read(questions(9), NEW_TOKENS, behind=[prefix], after=reading.rewound(20))
      answers += [*answer, *written(engine, again)[0]]
      num_bytes.append(bytes_on_devices(prefix))
  return answers, num_bytes


def bytes_on_devices(prefix):
  """Bytes of keys and values by the device that has them."""
  counted = collections.Counter()
  for array in jax.tree.leaves([cache.stored for cache in prefix.caches]):
    for shard in array.addressable_shards:
      counted[shard.device] += shard.data.nbytes
  return counted


@pytest.mark.parametrize(
  "name, dropout, cache",
  [
    (MIXED, "on", "int8"),
    pytest.param("fsdp 2 x sequence 2 x tensor 2", "off", None, marks=pytest.mark.slow),
  ],
)
def test_a_video_that_grows_in_odd_pieces_answers_as_on_one_device(name, dropout, cache):
  answers, _ = grown(name, dropout, cache)
  assert answers == grown(ONE, dropout, cache)[0]
  assert len(set(map(tuple, answers))) > 4


def test_every_device_has_an_equal_part_of_a_video_also_when_it_has_grown():
  on_devices, on_one = (grown(name, "on", "int8")[1] for name in (MIXED, ONE))
  for here, whole in zip(on_devices, on_one, strict=True):
    assert set(here) == set(jax.devices())
    assert set(here.values()) == {here.total() // 8}
    assert here.total() >= whole.total()
  assert on_devices[0].total() == on_one[0].total()
  assert on_devices[-1].total() > on_devices[0].total()


def test_int8_weights_are_split_and_answer_as_on_one_device(checkpoint):
  answers = []
  for mesh in (None, vcf.MeshConfig(fsdp=4, tensor=2)):
    chat = vcf.VideoChat.from_pretrained(checkpoint, mesh=mesh, weights="int8")
    answers.append(chat.ask("Where?", max_new_tokens=8))
  decoder = dummy_config().decoder
  up = chat.engine._model[-1]["decoder"]["layers"]["stacked"]["up_proj"]["kernel"]
  for array, rows in ((up.qvalue, decoder.width), (up.scale, 1)):
    shards = {shard.data.shape for shard in array.addressable_shards}
    assert shards == {(decoder.depth, rows, decoder.mlp_width // 2)}
  assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
  "sizes, said",
  [
    ({"tensor": 4}, r"mesh\.tensor is 4, but \w+ has num_kv_heads 2"),
    ({"tensor": 3, "data": 2}, r"mesh: data 2"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(checkpoint, sizes, said):
  with pytest.raises(vcf.InputError, match=said) as error:
    vcf.VideoChat.from_pretrained(checkpoint, mesh=vcf.MeshConfig(**sizes))
  assert "\n" not in str(error.value)


def test_slots_that_cannot_be_split_evenly_are_refused():
  mesh = make_mesh(MeshConfig(sequence=3, fsdp=2), jax.devices()[:6])
  said = r"^mesh\.data x mesh\.fsdp x mesh\.sequence is 6, over which .* a divisor of 64 .*$"
  with pytest.raises(vcf.InputError, match=said):
    Engine(dummy_model(), (3,), Layout(mesh))


def test_a_window_needs_slots_that_are_not_split():
  engine_on("tensor 2").check_window()
  said = r"^window .* mesh\.data x mesh\.fsdp x mesh\.sequence is 4; make it 1 .*$"
  with pytest.raises(vcf.InputError, match=said):
    engine_on(MIXED).check_window()


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
