"""Batches: the same for the same seed wherever they are begun, however they are read."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.data.batches.saved_batches import digest
from tests.data.batches.small_mixture import (
  CLIP_TOKENS,
  SIZE,
  config,
  make_tokenizer,
  read_rows,
  write_mixture,
)
from videochat_flash_jax.data.batches import train_batches
from videochat_flash_jax.data.batches.train_batches import batch_metrics, mixture_batches
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.data.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from videochat_flash_jax.errors import InputError

ROOT = Path(__file__).parents[3]
NUM_STOPS, NUM_FOLLOWING = 20, 10


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def rows(mixture):
  return read_rows(mixture)


@pytest.fixture(scope="module")
def run(rows):
  """States before each batch, and what the batches hold."""
  batches, states, digests = iter(mixture_batches(config(rows=1), rows, make_tokenizer)), [], []
  for _ in range(50):
    states.append(json.loads(json.dumps(batches.get_state())))
    digests.append(digest(next(batches)))
  return states, digests


def in_new_process(mixture, states):
  script = ROOT / "tests" / "data" / "batches" / "saved_batches.py"
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.run(
    [sys.executable, str(script), str(mixture), json.dumps(states), str(NUM_FOLLOWING)],
    env=environment, capture_output=True, text=True, timeout=500,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr[-3000:]
  return json.loads(process.stdout.splitlines()[-1])


def check_stops(mixture, run, workers):
  """Each number of workers with a stop; the first batch of all may be one."""
  states, digests = run
  stops = np.random.default_rng(1).choice(len(states) - NUM_FOLLOWING, len(workers), replace=False)
  found = in_new_process(
    mixture, [(count, states[stop]) for count, stop in zip(workers, stops, strict=True)]
  )
  for stop, following in zip(stops, found, strict=True):
    assert following == digests[stop : stop + NUM_FOLLOWING], stop


@pytest.mark.slow
def test_a_new_process_goes_on_exactly_from_any_of_20_states(mixture, run):
  check_stops(mixture, run, [0] * NUM_STOPS)


@pytest.mark.slow
def test_a_new_process_with_one_or_two_workers_goes_on_exactly(mixture, run):
  check_stops(mixture, run, [2, 1])


@pytest.mark.slow
def test_a_new_process_with_two_workers_goes_on_exactly_from_any_of_20_states(mixture, run):
  check_stops(mixture, run, [2] * NUM_STOPS)


@pytest.mark.slow
def test_two_workers_give_the_same_and_their_state_goes_on_without_any(rows, run):
  states, digests = run
  batches = iter(mixture_batches(config(rows=1, workers=2), rows, make_tokenizer))
  assert [digest(next(batches)) for _ in range(8)] == digests[:8]
  assert batches.get_state() == states[8]
  batches.close()


def test_a_state_is_small_and_restored_at_once(rows, run):
  states, _ = run
  batches = iter(mixture_batches(config(rows=1), rows, make_tokenizer))
  batches.set_state(states[40])
  assert batches.get_state() == states[40]
  assert len(json.dumps(states[40])) < 2000


def test_orbax_saves_and_restores_the_batches_with_a_model(rows, tmp_path):
  batches = iter(mixture_batches(config(), rows, make_tokenizer))
  next(batches)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    args = ocp.args.Composite(
      model=ocp.args.StandardSave({"w": np.arange(3)}),
      data=grain.checkpoint.CheckpointSave(batches),
    )
    checkpointer.save(tmp_path / "saved", args)
    expected = digest(next(batches))
    other = iter(mixture_batches(config(), rows, make_tokenizer))
    checkpointer.restore(
      tmp_path / "saved", ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other))
    )
  assert digest(next(other)) == expected


@pytest.mark.parametrize(
  "change, said",
  [
    ({"seed": 4}, "made with seed 3, now it is 4; give 3"),
    ({"streams": 2}, "made with streams 1, now it is 2; give 1"),
    ({"tokens": 512}, "made with tokens 256, now it is 512"),
    ({"frames": (4, 16)}, r"made with frames \[4, 32\]"),
  ],
)
def test_a_state_of_other_batches_is_refused_in_one_line(rows, change, said):
  state = iter(mixture_batches(config(), rows, make_tokenizer)).get_state()
  with pytest.raises(InputError, match=said) as error:
    iter(mixture_batches(config(**change), rows, make_tokenizer)).set_state(state)
  assert "\n" not in str(error.value)


def test_a_state_of_another_mixture_is_refused(rows, tmp_path):
  state = iter(mixture_batches(config(), rows, make_tokenizer)).get_state()
  other = read_rows(write_mixture(tmp_path, num_videos=2, num_images=1, num_texts=1))
  fewer_frames = dataclasses.replace(rows, max_frames=8)  # these decide how rows are dealt
  for others in (other, fewer_frames):
    with pytest.raises(InputError, match=r"made with mixture .* the same max_frames to open_rows"):
      iter(mixture_batches(config(), others, make_tokenizer)).set_state(state)


def test_a_state_of_another_vocabulary_is_refused(rows, tmp_path):
  path = tmp_path / "tokenizer.model"
  train_sentencepiece(["What is shown? It is a cat."], path, 300)
  state = iter(mixture_batches(config(), rows, make_tokenizer)).get_state()
  other = iter(mixture_batches(config(), rows, functools.partial(SentencePieceTokenizer, path)))
  with pytest.raises(InputError, match=r"made with tokenizer .* give the one it was saved with"):
    other.set_state(state)


def test_a_state_of_fewer_streams_or_of_another_format_is_refused(rows):
  one = iter(mixture_batches(config(streams=2), rows, make_tokenizer, streams=[0])).get_state()
  both = iter(mixture_batches(config(streams=2), rows, make_tokenizer))
  with pytest.raises(InputError, match="reads 1; run as many processes"):
    both.set_state(one)
  with pytest.raises(InputError, match="have format 9"):
    both.set_state(one | {"version": 9})


def test_each_of_several_processes_gives_its_rows_of_what_one_gives(rows):
  whole = iter(mixture_batches(config(streams=2), rows, make_tokenizer))
  parts = [
    iter(mixture_batches(config(streams=2), rows, make_tokenizer, streams=[stream]))
    for stream in range(2)
  ]
  for _ in range(3):
    expected, halves = next(whole), [next(part) for part in parts]
    for name, array in expected.items():
      np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)


def test_the_merged_streams_of_several_processes_are_the_state_of_one(rows):
  whole = iter(mixture_batches(config(streams=2), rows, make_tokenizer))
  next(whole)
  streams = {}
  for stream in range(2):
    part = iter(mixture_batches(config(streams=2), rows, make_tokenizer, streams=[stream]))
    next(part)
    streams |= part.get_state()["streams"]
  assert whole.get_state()["streams"] == streams


def test_a_state_names_the_rows_of_the_last_batch(rows, monkeypatch):
  read, write_row = [], train_batches.write_row

  def spy(packed, *args):
    read.append([item.source_row for item in packed])
    write_row(packed, *args)

  monkeypatch.setattr(train_batches, "write_row", spy)
  batches = iter(mixture_batches(config(), rows, make_tokenizer))
  for number in range(3):
    next(batches)
    assert batches.get_state()["streams"]["0"]["last"] == read[2 * number :]


@pytest.mark.parametrize(
  "change",
  [
    {"num_shards": 4},
    {"num_shards": 1, "zigzag": False, "clips_per_shard": 48, "tiles_per_shard": 40},
    # Two images that wait in one row have 12 tiles.
    {"num_shards": 1, "zigzag": False, "clips_per_shard": 8, "tiles_per_shard": 10},
  ],
)
def test_with_another_row_shape_rows_are_packed_again_and_no_example_is_lost(
  rows, monkeypatch, caplog, change
):
  given, write_row = [], train_batches.write_row

  def spy(packed, *args):
    given.extend(item.number for item in packed)
    write_row(packed, *args)

  monkeypatch.setattr(train_batches, "write_row", spy)
  batches = iter(mixture_batches(config(rows=1), rows, make_tokenizer))
  for _ in range(8):
    next(batches)
  saved = json.loads(json.dumps(batches.get_state()))
  other = iter(mixture_batches(config(rows=1, **change), rows, make_tokenizer))
  with caplog.at_level("INFO", "videochat_flash_jax"):
    other.set_state(saved)
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith("rows are packed again, no example is lost: ") and ", now " in said
  assert other.get_state() == saved  # so that nothing changes if the run is stopped at once
  for _ in range(8):
    next(other)
  state = other.get_state()
  stream = state["streams"]["0"]
  waiting = [number for row in stream["unfinished"] for number, _ in row]
  assert sorted(given + waiting) == list(range(stream["next"]))
  assert stream["examples"] == stream["next"]
  expected = digest(next(other))
  again = iter(mixture_batches(config(rows=1, **change), rows, make_tokenizer))
  again.set_state(json.loads(json.dumps(state)))
  assert digest(next(again)) == expected


def test_batches_have_the_shapes_of_the_config(rows):
  batch = next(iter(mixture_batches(config(), rows, make_tokenizer)))
  assert (
    batch["frames"].shape == (2, 2 * 24, 4, SIZE, SIZE, 3) and batch["frames"].dtype == np.uint8
  )
  assert batch["tiles"].shape == (2, 2 * 40, 1, SIZE, SIZE, 3) and batch["tiles"].dtype == np.uint8
  for name in ("token_ids", "labels", "visual_index", "positions", "segment_ids"):
    assert batch[name].shape == (2, 256) and batch[name].dtype == np.int32
  padding = batch["segment_ids"] == 0
  assert (batch["labels"][padding] == IGNORE_LABEL).all()
  assert (batch["visual_index"][padding] == -1).all()
  room = (24 + 40) * CLIP_TOKENS
  assert batch["visual_index"].max() < room


def test_metrics_tell_how_full_rows_are(rows):
  batches = iter(mixture_batches(config(tokens=1024, frames=(4, 16)), rows, make_tokenizer))
  filled = [(next(batches)["segment_ids"] > 0).mean() for _ in range(3)]
  metrics = batch_metrics(batches.get_state())
  assert metrics["tokens_filled"] == pytest.approx(np.mean(filled))
  assert metrics["broken_share"] == 0


def test_images_are_refused_where_there_is_no_room_for_any(rows):
  with pytest.raises(InputError, match="tiles_per_shard is 0; give room"):
    mixture_batches(config(tiles_per_shard=0), rows, make_tokenizer)


def test_without_images_batches_have_no_tiles(tmp_path):
  rows = read_rows(write_mixture(tmp_path, num_videos=2, num_images=0, num_texts=2))
  batch = next(iter(mixture_batches(config(tiles_per_shard=0), rows, make_tokenizer)))
  assert "tiles" not in batch and batch["frames"].any()


@pytest.mark.parametrize(
  "change, said",
  [
    ({"frames": (4, 30)}, "multiples of 4"),
    ({"sampling": "fps1"}, "give dynamic_fps1 or middle"),
    ({"time_message": "none"}, "give short or long or ''"),
    ({"streams": 3}, "rows is 2 and streams 3"),
    ({"num_shards": 3}, "cannot be split into 3 equal parts"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_a_config_that_makes_no_batches_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    config(**change)
