"""Processes that share rows take the same examples, whatever each of them finds on its disks.

The processes are threads here, each with batches of its own; they tell each other texts in memory.
"""

import json
import logging
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
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
from tests.parallel.exchange_test import MemoryStore
from videochat_flash_jax.data.batches import train_batches
from videochat_flash_jax.data.batches.examples import Example, skipped_positions
from videochat_flash_jax.data.batches.replacement import ReplacingReader
from videochat_flash_jax.data.batches.row_packer import RowPacker
from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN
from videochat_flash_jax.data.batches.train_batches import TrainBatches, mixture_batches
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.exchange import Exchange

CONFIG = config(rows=2, streams=2, max_broken_share=1.0)
NUM_ROWS, NUM_BATCHES = 20, 4
VIDEO = 5  # the row about which processes differ
GONE = BrokenRow("missing file", "gone")

this_thread = threading.local()


class FakeRows:
  """Rows of one kind, each about a video of its own."""

  def __getitem__(self, index):
    return index

  def kind(self, index):
    return "video"

  def draw_of_kind(self, kind, most, rng):
    return rng.permutation(NUM_ROWS)[:most].tolist()

  def media(self, index):
    return [f"{index}.mp4"]

  def source(self, index):
    return "rows.jsonl"

  def label(self, index):
    return f"row {index}"


class FakeOrder:
  """Each stream goes through all rows, in an order of its own."""

  def row(self, stream, number):
    return (number * (3 + 4 * stream) + stream) % NUM_ROWS


def example_of(row, rng):
  """One to three clips and some text, which depend on the row."""
  draw, num_clips, num_text = np.random.default_rng(row), 1 + row % 3, 40 + row % 7
  num_visual = CLIP_TOKENS * num_clips
  visual_index = np.full(num_text + num_visual, -1, np.int32)
  visual_index[3 : 3 + num_visual] = np.arange(num_visual)
  ids, labels = draw.integers(1, 500, (2, len(visual_index)), np.int32)
  return Example(
    frames=draw.integers(0, 255, (num_clips, 4, SIZE, SIZE, 3), np.uint8),
    tiles=np.zeros((0, 1, SIZE, SIZE, 3), np.uint8),
    token_ids=np.where(visual_index < 0, ids, 0),
    labels=np.where(visual_index < 0, labels, IGNORE_LABEL),
    visual_index=visual_index,
    positions=skipped_positions(len(visual_index), 50, rng),
  )


class Reader:
  """Reads rows; what is read of VIDEO goes through `fault(example, number of the reading)`."""

  def __init__(self, fault, every_row):
    self.fault, self.every_row, self.num_reads = fault, every_row, 0

  def read(self, row, rng):
    example = example_of(row, rng)
    if row != VIDEO and not self.every_row:
      return example
    self.num_reads += 1
    return self.fault(example, self.num_reads)


def healthy(example, _):
  return example


def raises(error, times=10**9):
  def fault(example, number):
    if number <= times:
      raise error
    return example

  return fault


def other_pixels(example, _):
  return example._replace(frames=example.frames ^ 1)


def other_pixels_once(example, number):
  return other_pixels(example, number) if number == 1 else example


def other_tokens(example, _):
  return example._replace(token_ids=example.token_ids + (example.visual_index < 0))


def fewer_frames(example, _):
  """As `other_pixels`, but of a shorter video."""
  num_clips = len(example.frames) - 1
  is_kept = example.visual_index < num_clips * CLIP_TOKENS
  per_token = {name: getattr(example, name)[is_kept] for name in PER_TOKEN[:-1]}
  return example._replace(frames=example.frames[:-1], **per_token)


def damaged(example, _):
  return example._replace(is_damaged=True)


class InMemory:
  """How one process shares all streams."""

  unit = "step"

  def __init__(self, store, processes, here, streams):
    self.store, self.processes, self.here, self.streams = store, processes, here, streams
    self.begun = 0

  def begin(self):
    self.begun += 1
    return {
      stream: Exchange(f"{self.begun}/{stream}", self.processes, self.here, self.store)
      for stream in self.streams
    }


def batches_of(fault, config=CONFIG, sharing=None, every_row=False):
  """An iterator over the batches of a process."""
  reader = ReplacingReader(FakeRows(), Reader(fault, every_row), FakeOrder(), config.seed)
  return iter(TrainBatches(config, reader, {}, sharing=sharing))


def processes_of(*faults, config=CONFIG, **changes):
  """Iterators over the batches of processes that share their streams, one for each fault."""
  store, processes, streams = MemoryStore(), range(len(faults)), range(config.streams)
  return [
    batches_of(fault, config, InMemory(store, processes, here, streams), **changes)
    for here, fault in enumerate(faults)
  ]


def together(function, *iterators):
  """What the function returns for each iterator, or the `InputError` that it raises."""

  def outcome(number, iterator):
    this_thread.number = number
    try:
      return function(iterator)
    except InputError as error:
      return error

  with ThreadPoolExecutor(len(iterators)) as pool:
    tasks = [pool.submit(outcome, *each) for each in enumerate(iterators)]
    return [task.result(timeout=120) for task in tasks]


def read(iterator, num_batches=NUM_BATCHES):
  """Digests of batches, and the states of the streams after them."""
  digests = [digest(next(iterator)) for _ in range(num_batches)]
  return digests, json.loads(json.dumps(iterator.get_state()["streams"]))


def broken(streams):
  """Counts of broken examples by reason, of all streams."""
  counts = {}
  for stream in streams.values():
    for reasons in stream["broken"].values():
      for reason, count in reasons.items():
        counts[reason] = counts.get(reason, 0) + count
  return counts


@pytest.fixture(scope="module")
def undisturbed():
  """Batches of a process that shares nothing."""
  return read(batches_of(healthy))


def test_processes_without_faults_read_what_one_process_reads(undisturbed):
  for found in together(read, *processes_of(healthy, healthy, healthy)):
    assert found == undisturbed


@pytest.mark.parametrize("fault", [raises(GONE, times=1), other_pixels_once])
def test_a_fault_that_another_process_has_once_changes_nothing(undisturbed, fault, caplog):
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    found = together(read, *processes_of(healthy, fault))
  assert found == [undisturbed, undisturbed]
  if fault is not other_pixels_once:
    (record,) = caplog.records
    assert record.getMessage() == (
      "process 1 tries rows.jsonl, row 5 again, which process 0 has read: missing file: gone"
    )


def test_the_stand_in_of_the_first_process_is_that_of_all(undisturbed):
  first, *others = together(read, *processes_of(raises(GONE, times=1), healthy, healthy))
  assert others == [first, first]
  assert first[0] != undisturbed[0] and broken(first[1]) == {"missing file": 1}


@pytest.mark.parametrize(
  "faults, reason",
  [
    pytest.param((healthy, raises(GONE)), "missing file", id="gone in the second"),
    pytest.param((raises(GONE), healthy), "missing file", id="gone in the first"),
    pytest.param((raises(GONE), raises(GONE)), "missing file", id="gone in both"),
    pytest.param((healthy, other_pixels), "differs between hosts", id="other pixels"),
    pytest.param((healthy, fewer_frames), "differs between hosts", id="fewer frames"),
    pytest.param((damaged, healthy), "differs between hosts", id="damaged in the first"),
    pytest.param((healthy, healthy, other_tokens), "differs between hosts", id="other tokens"),
  ],
)
def test_a_row_that_not_all_can_use_is_replaced_in_all_as_if_it_were_broken(faults, reason, caplog):
  digests, streams = read(batches_of(raises(GONE)))
  caplog.clear()
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    found = together(read, *processes_of(*faults))
  assert found == [found[0]] * len(faults)
  assert found[0][0] == digests
  assert broken(streams)["missing file"] > 0
  assert broken(found[0][1]) == {reason: broken(streams)["missing file"]}
  if reason == "differs between hosts":
    said = f"process {len(faults) - 1} reads other frames or tokens than process 0; give all hosts"
    assert any(said in record.getMessage() for record in caplog.records)


def test_too_many_broken_rows_stop_all_processes_with_the_same_line():
  strict = config(rows=2, streams=2, max_broken_share=0.01)
  pair = processes_of(healthy, raises(GONE), config=strict)
  first, second = map(str, together(lambda iterator: read(iterator, 100), *pair))
  assert first == second and "examples could not be read, and max_broken_share is 0.01" in first


def test_an_error_that_no_row_causes_in_one_process_stops_all():
  fault = raises(InputError("the index is gone"))
  first, second = together(read, *processes_of(healthy, fault))
  assert (str(first), str(second)) == ("process 1: the index is gone", "the index is gone")


def test_a_process_that_can_read_nothing_stops_all():
  pair = processes_of(healthy, raises(GONE), every_row=True)
  first, second = map(str, together(read, *pair))
  assert second.startswith("neither a row nor any of its replacements can be read: 20 were tried")
  assert first == f"process 1: {second}"


def test_processes_that_read_all_rows_otherwise_stop():
  pair = processes_of(healthy, other_pixels, every_row=True)
  first, second = map(str, together(read, *pair))
  assert first.startswith("neither a row nor any of its replacements can be read: 20 were tried")
  assert "process 1 reads other frames or tokens than process 0; give all hosts the same" in first
  assert second == f"process 0: {first}"


def test_a_run_resumes_after_a_substitution_as_if_it_had_not_stopped():
  whole, again = together(lambda i: read(i, 8), *processes_of(healthy, raises(GONE)))
  assert whole == again and broken(whole[1])
  begun = processes_of(healthy, raises(GONE))
  for stop in range(1, 8):
    together(next, *begun)
    state, other = (iterator.get_state() for iterator in begun)
    assert state == other
    resumed = processes_of(healthy, raises(GONE))
    for iterator in resumed:
      iterator.set_state(json.loads(json.dumps(state)))
    for digests, streams in together(lambda i, n=8 - stop: read(i, n), *resumed):
      assert (digests, streams) == (whole[0][stop:], whole[1])


def test_one_process_resumes_what_two_have_begun_and_two_what_one_has():
  pair = processes_of(healthy, raises(GONE, times=1))
  together(lambda iterator: read(iterator, 3), *pair)
  alone = batches_of(healthy)
  alone.set_state(json.loads(json.dumps(pair[0].get_state())))
  following = read(alone)
  assert together(read, *pair) == [following] * 2
  pair = processes_of(healthy, healthy)
  for iterator in pair:
    iterator.set_state(alone.get_state())
  assert together(read, *pair) == [read(alone)] * 2


def test_all_begin_again_from_an_earlier_state():
  pair = processes_of(healthy, raises(GONE, times=1))
  state = pair[0].get_state()
  found = together(read, *pair)
  for iterator in pair:
    iterator.set_state(state)
  assert together(read, *pair) == found


@pytest.mark.parametrize(
  "faults, said",
  [
    ((healthy, raises(GONE)), "cannot be read now: missing file: gone"),
    ((raises(GONE), healthy), "cannot be read now: missing file: gone"),
    ((healthy, other_pixels), "cannot be read now: differs between hosts: process 1 reads other"),
  ],
)
def test_a_row_that_one_process_cannot_read_again_stops_all(faults, said):
  begun = batches_of(healthy)
  while not any([number, VIDEO] in row for row in unfinished(begun) for number, _ in row):
    next(begun)
  pair = processes_of(*faults)
  for iterator in pair:
    iterator.set_state(begun.get_state())
  first, second = map(str, together(read, *pair))
  for line in (first, second):
    assert f"rows.jsonl, row {VIDEO} was read before the run was saved, but {said}" in line
    assert "\n" not in line
  assert re.sub("^process .: ", "", first) == re.sub("^process .: ", "", second)


def unfinished(iterator):
  """The packed rows that are not full, of all streams."""
  return [
    row for stream in iterator.get_state()["streams"].values() for row in stream["unfinished"]
  ]


@pytest.mark.parametrize("field", PER_TOKEN)
def test_packed_rows_that_differ_stop_all_and_the_step_and_the_processes_are_named(
  monkeypatch, field
):
  trio, write_row, calls = processes_of(*[healthy] * 3), train_batches.write_row, []

  def spoil(packed, row_shape, batch, number):
    write_row(packed, row_shape, batch, number)
    if this_thread.number == 1:
      calls.append(number)
      if len(calls) == 6:  # the second row of the third batch
        batch[field][number, 9] += 1

  monkeypatch.setattr(train_batches, "write_row", spoil)
  (said,) = {str(error) for error in together(read, *trio)}
  assert said.startswith(
    "step 3: processes 0 and 1 share rows, but have packed different ones; start all processes "
  )
  first, *others = [iterator.get_state() for iterator in trio]
  assert others == [first, first]
  assert [stream["places"] for stream in first["streams"].values()] == [2 * 256, 2 * 256]


def test_a_process_that_packs_otherwise_stops_all(monkeypatch):
  pair, add, full = processes_of(healthy, healthy), RowPacker.add, []

  def late(self, item):
    row = add(self, item)
    if row and this_thread.number == 1:
      full.append(row)
      return row if len(full) != 4 else None
    return row

  monkeypatch.setattr(RowPacker, "add", late)
  (said,) = {str(error) for error in together(read, *pair)}
  found = r"are at different places \(example \d+, packed rows\)"
  assert re.match(f"step 2: processes 0 and 1 share rows, but {found}; start all", said)


def test_processes_that_are_at_different_examples_stop():
  pair, ahead = processes_of(healthy, healthy), batches_of(healthy)
  next(ahead)
  for iterator, state in zip(pair, (pair[0].get_state(), ahead.get_state()), strict=True):
    iterator.set_state(state)
  for error in together(read, *pair):
    said = r"step [12]: processes 0 and 1 share rows, but are at different places \(example .*\); "
    assert re.match(said, str(error))


def test_a_process_reads_streams_of_its_own_beside_shared_ones(undisturbed):
  store = MemoryStore()
  shared = [InMemory(store, (0, 1), here, streams=[1]) for here in range(2)]
  reader = ReplacingReader(FakeRows(), Reader(healthy, False), FakeOrder(), CONFIG.seed)
  both = iter(TrainBatches(CONFIG, reader, {}, sharing=shared[0]))
  one = iter(TrainBatches(CONFIG, reader, {}, streams=[1], sharing=shared[1]))
  (digests, streams), (_, second) = together(read, both, one)
  assert (digests, streams) == undisturbed and second == {"1": streams["1"]}


def test_what_is_not_shared_has_no_digests_and_tells_nothing(monkeypatch):
  monkeypatch.setattr(Exchange, "tell", None)
  monkeypatch.setattr("videochat_flash_jax.data.batches.shared_stream.digest", None)
  alone = batches_of(healthy, sharing=InMemory(MemoryStore(), (0,), 0, streams=()))
  assert read(alone) == read(batches_of(healthy))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_whose_disks_differ_take_the_same_examples(tmp_path, workers):
  (tmp_path / "own").mkdir()
  mixture = write_mixture(tmp_path / "own", num_videos=5, num_images=2, num_texts=3)
  rows, other = [read_rows(mixture)], shutil.copytree(tmp_path / "own", tmp_path / "other")
  mixture = other / mixture.name
  mixture.write_text(mixture.read_text().replace(str(tmp_path / "own"), str(other)))
  (other / "0.mp4").unlink()
  (other / "1.mp4").write_bytes((other / "2.mp4").read_bytes())
  rows.append(read_rows(mixture))
  made, store = config(rows=1, workers=workers, max_broken_share=1.0), MemoryStore()
  pair = [
    iter(mixture_batches(made, each, make_tokenizer, sharing=InMemory(store, (0, 1), here, (0,))))
    for here, each in enumerate(rows)
  ]
  first, second = together(lambda iterator: read(iterator, 6), *pair)
  for iterator in pair:
    iterator.close()
  assert first[0] == second[0]
  counts = broken(first[1])
  assert counts["missing file"] > 0 and counts["differs between hosts"] > 0
  assert counts == broken(second[1])
