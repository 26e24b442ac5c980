"""Rows that cannot be read are replaced, counted and logged, and stop a run only when many."""

import collections
import errno
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest

from tests.data.batches.small_mixture import config, make_tokenizer, read_rows
from tests.data.mixture.mutations import write_mutated_mixture
from videochat_flash_jax.data.batches import replacement
from videochat_flash_jax.data.batches.broken_share import BrokenShare
from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.data.batches.examples import Example, ExampleReader
from videochat_flash_jax.data.batches.replacement import (
  Drawn,
  ReplacingReader,
  SkippedRow,
  may_pass,
)
from videochat_flash_jax.data.batches.train_batches import batch_metrics, mixture_batches
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

CONFIG = config(max_broken_share=1.0)


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mutated")
  return write_mutated_mixture(folder, num_rows=200, num_videos=100, num_healthy=160, seed=0)


@pytest.fixture(scope="module")
def rows(mutated):
  return read_rows(mutated.path)


def reader_of(rows):
  order = ExampleOrder(rows, CONFIG.seed, 1)
  reader = ExampleReader(CONFIG.example, CONFIG.row_shape, make_tokenizer)
  return ReplacingReader(rows, reader, order, CONFIG.seed), order


def resident_bytes():
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_an_epoch_delivers_every_healthy_row_and_counts_every_broken_one(mutated, rows, caplog):
  reader, order = reader_of(rows)
  share, seen, reasons = BrokenShare(1.0), set(), {}
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    for number in range(len(rows)):
      drawn = reader.read(0, number)
      share.count(drawn)
      label = rows.label(order.row(0, number))
      if drawn.skipped:
        reasons[label] = drawn.skipped[0].reason
      else:
        seen.add(label)
  assert seen - set(mutated.doubtful) == set(mutated.healthy)
  assert {
    row: why for row, why in reasons.items() if row not in mutated.doubtful
  } == mutated.expected
  counted = collections.Counter()
  for counts in share.state()["broken"].values():
    counted += collections.Counter(counts)
  assert counted == collections.Counter(reasons.values()) and share.num_broken == len(reasons)
  replaced = [record.message for record in caplog.records if "is replaced" in record.message]
  assert len(replaced) == len(set(replaced)) == len(reasons)

  before = resident_bytes()
  for number in range(len(rows), 2 * len(rows)):
    reader.read(0, number)
  assert resident_bytes() - before < 50e6


@pytest.mark.slow
def test_workers_give_batches_of_such_a_mixture_with_the_same_counts(rows):
  batches = iter(mixture_batches(config(max_broken_share=1.0, workers=2), rows, make_tokenizer))
  for _ in range(6):
    next(batches)
  state = batches.get_state()
  batches.close()
  reader, _ = reader_of(rows)
  share = BrokenShare(1.0)
  counts = state["streams"]["0"]
  for number in range(counts["examples"]):
    share.count(reader.read(0, number))
  assert share.state() == {name: counts[name] for name in ("examples", "damaged", "cut", "broken")}
  metrics = batch_metrics(state)
  assert metrics["broken_share"] == share.num_broken / share.num_examples
  assert metrics["broken/bad times"] == sum(
    c["bad times"] for c in share.state()["broken"].values()
  )


def test_too_many_broken_rows_stop_the_run_and_the_worst_sources_are_named(rows):
  batches = iter(mixture_batches(config(max_broken_share=0.3), rows, make_tokenizer))
  said = r"of \d\d\d examples .* 0.3: .*videos.jsonl \d+ \("
  with pytest.raises(InputError, match=said) as error:
    collections.deque(itertools.islice(batches, 100), maxlen=0)
  assert "\n" not in str(error.value) and "vcflash data check" in str(error.value)


class FakeRows:
  """Ten rows of one kind; reading number n raises what `errors[n]` holds, first to last."""

  def __init__(self, errors, kind="video", paths=()):
    self.errors, self.num_reads, self._kind = errors, collections.Counter(), kind
    self.paths = dict(paths)
    self.lengths, self.weights, self.source_ranges = np.ones(10, np.int32), [1.0], [(0, 10)]

  def __len__(self):
    return 10

  def __getitem__(self, index):
    self.num_reads[index] += 1
    if self.errors.get(index):
      raise self.errors[index].pop(0)
    return {"number": index}

  def kind(self, index):
    return self._kind

  def draw_of_kind(self, kind, most, rng):
    return [*range(4, 10), *range(4)][:most]

  def media(self, index):
    return [self.paths.get(index, f"{index}.mp4")]

  def source(self, index):
    return "a.jsonl"

  label = source


class FakeReader:
  def __init__(self, errors=(), damaged=(), cut=()):
    self.errors, self.damaged, self.cut = dict(errors), damaged, cut

  def read(self, row, rng):
    if row["number"] in self.errors:
      raise self.errors[row["number"]]
    none = [None] * 5
    number = row["number"]
    return Example(number, *none, number in self.damaged, number in self.cut)


def example_of(drawn):
  return drawn.example.frames


class FakeOrder:
  def row(self, stream, number):
    return number


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
  monkeypatch.setattr(replacement, "_RETRY_SECONDS", (0, 0))


def replacing(rows, **reader):
  return ReplacingReader(rows, FakeReader(**reader), FakeOrder(), seed=0)


def drawn_of(rows, number=3, **reader):
  return replacing(rows, **reader).read(0, number)


def test_a_failure_that_passes_is_tried_again_and_not_counted():
  rows = FakeRows({3: [OSError(errno.EIO, "input/output error"), TimeoutError()]})
  drawn = drawn_of(rows)
  assert drawn.row == example_of(drawn) == 3 and drawn.skipped == ()
  assert rows.num_reads[3] == 3


def test_a_failure_that_does_not_pass_is_replaced_by_another_row():
  rows = FakeRows(
    {3: [OSError(errno.EIO, "input/output error")] * 9, 4: [BrokenRow("no frames", "b")]}
  )
  drawn = drawn_of(rows)
  assert drawn.row == example_of(drawn) == 5 and rows.num_reads == {3: 3, 4: 1, 5: 1}
  assert [row.reason for row in drawn.skipped] == ["unreadable video", "no frames"]


def test_rows_that_are_all_broken_end_the_search():
  rows = FakeRows({n: [BrokenRow("missing file", "gone")] * 3 for n in range(10)})
  with pytest.raises(InputError, match=r"10 were tried, the first one .* missing file: gone"):
    drawn_of(rows)


def test_a_row_about_a_medium_that_has_just_failed_is_not_tried():
  gone, badly_timed = BrokenRow("missing file", "gone"), BrokenRow("bad times", "late")
  paths = {3: "a.mp4", 4: "a.mp4", 5: "b.mp4", 6: "b.mp4"}
  rows = FakeRows({3: [gone], 4: [gone], 5: [badly_timed]}, paths=paths)
  drawn = drawn_of(rows)
  assert drawn.row == 6 and [row.row for row in drawn.skipped] == [3, 5]
  assert 4 not in rows.num_reads


@pytest.mark.parametrize(
  "kind, reason",
  [("video", "unreadable video"), ("image", "unreadable image"), ("text", "bad conversations")],
)
def test_whatever_a_row_brings_about_breaks_that_row_alone(kind, reason):
  rows = FakeRows({}, kind)
  drawn = drawn_of(rows, errors={3: IndexError("list index")})
  assert drawn.row == 4
  (skipped,) = drawn.skipped
  assert (skipped.row, skipped.reason) == (3, reason)
  assert skipped.message == f"{reason}: IndexError: list index"


def test_an_error_that_is_not_the_rows_ends_the_run():
  gone = InputError("a.jsonl is gone")
  with pytest.raises(InputError, match=r"^a.jsonl is gone"):
    drawn_of(FakeRows({3: [gone]}))
  gone.__cause__ = TimeoutError()
  rows = FakeRows({3: [gone]})
  assert drawn_of(rows).row == 3 and rows.num_reads[3] == 2


def test_a_row_that_is_read_again_is_not_replaced():
  rows = FakeRows({3: [BrokenRow("missing file", "gone")] * 2})
  reader = replacing(rows)
  assert reader.read(0, 3).row == reader.read_again(0, 3, 4).row == 4
  with pytest.raises(InputError, match=r"^a.jsonl, a.jsonl was read before .* missing file: gone"):
    reader.read_again(0, 3, 3)


def test_damaged_videos_are_used_counted_and_logged_once(caplog):
  reader, share = replacing(FakeRows({}), damaged=(3,)), BrokenShare(0.0)
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    for number in (2, 3, 3):
      share.count(reader.read(0, number))
  assert share.state() == {"examples": 3, "damaged": 2, "cut": {}, "broken": {}}
  assert [record.message for record in caplog.records] == [
    "a.jsonl, a.jsonl is damaged, and used as far as it can be read"
  ]


def test_what_caused_an_error_tells_whether_it_may_pass():
  outer = BrokenRow("unreadable video", "a")
  assert not may_pass(outer)
  outer.__cause__ = InputError("b")
  outer.__cause__.__cause__ = OSError(errno.ESTALE, "stale file handle")
  assert may_pass(outer)
  assert not may_pass(FileNotFoundError(errno.ENOENT, "no such file"))


def broken(source, reason):
  return Drawn(None, 1, (SkippedRow(0, source, "row 1", reason, reason),))


def test_a_few_broken_rows_at_the_start_do_not_stop_a_run():
  share = BrokenShare(0.01)
  share.count(broken("a.jsonl", "missing file"))
  for _ in range(149):
    share.count(Drawn(None, 1))
  with pytest.raises(InputError) as error:
    share.count(broken("b.jsonl", "no frames"))
  assert str(error.value).startswith(
    "2 of 151 examples could not be read, and max_broken_share is 0.01: "
    "a.jsonl 1 (1 missing file); b.jsonl 1 (1 no frames); fix them"
  )


def test_the_limit_is_for_all_streams_together():
  share = BrokenShare(0.01)
  share.count(broken("a.jsonl", "missing file"), stream=1)
  for _ in range(98):
    share.count(Drawn(None, 1), stream=2)
  with pytest.raises(InputError, match=r"2 of 100 .*: a.jsonl 2 \(1 missing file, 1 no frames\)"):
    share.count(broken("a.jsonl", "no frames"), stream=2)


def test_counts_go_on_from_a_state():
  share, other = BrokenShare(1.0), BrokenShare(1.0)
  share.count(broken("a.jsonl", "no frames"))
  share.count(Drawn(None, 1, damaged="b.mp4"))
  share.count(Drawn(None, 2, cut=("b.jsonl", "long")))
  other.set_state(share.state())
  other.count(broken("a.jsonl", "no frames"))
  counts = {"examples": 4, "damaged": 1, "cut": {"b.jsonl": 1}}
  assert other.state() == counts | {"broken": {"a.jsonl": {"no frames": 2}}}


def test_a_state_of_an_earlier_version_has_no_counts_of_cut_answers():
  share = BrokenShare(1.0)
  share.set_state({"examples": 3, "damaged": 1, "broken": {}})
  share.count(Drawn(None, 2, cut=("b.jsonl", "long")))
  assert share.state() == {"examples": 4, "damaged": 1, "cut": {"b.jsonl": 1}, "broken": {}}


def test_cut_answers_are_counted_by_source_and_the_first_of_each_is_logged(caplog):
  reader = FakeReader(cut=(3, 4))
  replacing_reader = ReplacingReader(FakeRows({}), reader, FakeOrder(), seed=0)
  share = BrokenShare(0.0)
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    for number in (2, 3, 4, 3):
      share.count(replacing_reader.read(0, number), stream=number % 2)
    share.count(Drawn(None, 7, cut=("caf\udce9.jsonl", "long\n")))
  assert [share.state(stream)["cut"] for stream in (0, 1)] == [
    {"a.jsonl": 1, "caf\udce9.jsonl": 1}, {"a.jsonl": 2}
  ]  # fmt: skip
  first, second = (record.message for record in caplog.records)
  assert first.startswith("a.jsonl, a.jsonl is longer than a training row")
  assert second.startswith(r"caf\udce9.jsonl, long")


def test_cut_answers_are_among_the_metrics():
  def state(**cut):
    counts = {"examples": 10, "damaged": 0, "broken": {}, "cut": cut}
    return {"streams": {"0": counts | dict.fromkeys(("tokens", "visual_tokens", "places"), 1)}}

  metrics = batch_metrics(state(a=5, b=2), before=state(a=3, b=2))
  assert {name: n for name, n in metrics.items() if "cut" in name} == {"cut": 2, "cut/a": 2}
  metrics = batch_metrics(state(**{"caf\udce9": 1}))
  assert metrics["cut"] == metrics[r"cut/caf\udce9"] == 1
