import hashlib
import json

import numpy as np
import pytest

from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.errors import InputError


class Lengths:
  """Rows of which only lengths, sources and weights are known."""

  def __init__(self, sizes, weights=None):
    self.lengths = np.random.default_rng(0).integers(10, 9000, sum(sizes))
    ends = np.cumsum(sizes).tolist()
    self.source_ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    self.weights = weights or [1.0] * len(sizes)

  def __len__(self):
    return len(self.lengths)

  def source(self, row):
    return f"source of {row}"


def drawn(rows, count, seed=0, streams=1):
  order = ExampleOrder(rows, seed, streams)
  return [[order.row(stream, number) for number in range(count)] for stream in range(streams)]


def test_every_epoch_holds_every_row_once_in_another_order():
  (rows,) = drawn(Lengths([30, 70]), 200)
  assert sorted(rows[:100]) == sorted(rows[100:]) == list(range(100))
  assert rows[:100] != rows[100:] and rows[:100] != sorted(rows[:100])


def test_a_row_is_seen_as_often_as_its_source_weighs():
  (rows,) = drawn(Lengths([40, 20, 10], weights=[0.5, 1.0, 3.0]), 2 * 70)
  for epoch in (rows[:70], rows[70:]):
    counts = np.bincount(epoch, minlength=70)
    assert counts[:40].sum() == 20 and counts[:40].max() == 1
    assert (counts[40:60] == 1).all() and (counts[60:] == 3).all()
  assert (np.bincount(rows)[:40] == 1).all()  # the second epoch shows the other half


def test_streams_share_the_order_and_have_about_the_same_to_do():
  rows = Lengths([640])
  dealt = drawn(rows, 160, streams=4)
  assert sorted(row for stream in dealt for row in stream) == list(range(640))
  for window in range(0, 160, 16):
    totals = [rows.lengths[stream[window : window + 16]].sum() for stream in dealt]
    assert max(totals) < 1.05 * min(totals)
  assert dealt[0] != sorted(dealt[0], key=lambda row: -rows.lengths[row])


def test_order_depends_on_the_seed_and_can_be_begun_anywhere():
  rows = Lengths([50])
  assert drawn(rows, 40) == drawn(rows, 40) != drawn(rows, 40, seed=1)
  order = ExampleOrder(rows, 0, 1)
  assert [order.row(0, number) for number in (39, 3)] == [drawn(rows, 40)[0][n] for n in (39, 3)]


def test_the_digest_changes_even_if_the_shuffle_changes_for_one_example(monkeypatch):
  rows, row = Lengths([500]), ExampleOrder.row
  digests = [ExampleOrder(rows, *key).digest() for key in ((0, 1), (0, 1), (1, 1), (0, 2))]
  assert digests[0] == digests[1] and len(set(digests)) == 3

  def changed(self, stream, number):
    return row(self, stream, number + (number == 99))

  monkeypatch.setattr(ExampleOrder, "row", changed)
  assert ExampleOrder(rows, 0, 1).digest() != digests[0]


def test_a_weight_that_leaves_nothing_of_a_source_is_refused():
  said = "^source of 40: weight 0.5 leaves none of its 1 rows; give at least 1, or remove"
  with pytest.raises(InputError, match=said):
    ExampleOrder(Lengths([40, 1], weights=[1.0, 0.5]), 0, 1)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_form_of_a_digest_stays_as_saved_states_have_it(streams):
  rows = Lengths([30, 70])
  by_example = list(zip(*drawn(rows, 100, streams=streams), strict=True))
  expected = hashlib.blake2b(json.dumps(by_example).encode(), digest_size=8).hexdigest()
  assert ExampleOrder(rows, 0, streams).digest() == expected
