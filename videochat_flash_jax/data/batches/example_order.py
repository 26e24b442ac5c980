"""Computes the order in which the rows of a mixture are read, and which stream reads which row.

An epoch is a shuffle of all rows. The rows of a source of weight 2 are in it twice. Of a source of
weight 0.5, one epoch holds one half of the rows and the next epoch the other half. The order is cut
into windows, and the rows of a window are dealt to the streams so that all streams have about the
same amount of work:

  order of an epoch         4 0 7 2 | 5 1 3 6          a stream gets 16 rows of a window; here 2
  lengths of the rows       9 1 8 2   ...
  dealt to two streams      0: 4 0 | ...   1: 7 2 | ...

Everything is computed from the seed and the number of an example. Nothing is stored, so reading can
start at any example.
"""

import hashlib
import json

import grain
import numpy as np

from videochat_flash_jax.data.mixture.annotations import deal_evenly
from videochat_flash_jax.errors import InputError

_WINDOW = 16  # examples of each stream that are dealt at once
_DIGEST_EXAMPLES = 100  # examples of each stream from which the digest is computed


class ExampleOrder:
  """Says which row of the mixture is the n-th example of a stream."""

  def __init__(self, rows, seed: int, num_streams: int):
    """Prepares the order; no row is computed yet.

    Args:
      rows: the rows of a mixture. Only `len(rows)`, `rows.lengths`, `rows.weights` and
        `rows.source_ranges` are used.
      seed: seed of the shuffles.
      num_streams: number of streams that share the rows.

    Raises:
      InputError: a source has a weight so small that none of its rows would be read.
    """
    self._rows, self._num_streams = rows, num_streams
    spans = [stop - start for start, stop in rows.source_ranges]
    counts = [round(weight * span) for weight, span in zip(rows.weights, spans, strict=True)]
    for (start, _), span, count, weight in zip(
      rows.source_ranges, spans, counts, rows.weights, strict=True
    ):
      if span and not count:
        raise InputError(
          f"{rows.source(start)}: weight {weight:g} leaves none of its {span} rows; "
          f"give at least {1 / span:.2g}, or remove the source"
        )
    # The rows of a source are counted on from epoch to epoch: with weight 0.5, the second epoch
    # shows the other half.
    self._counts = counts
    self._ends = np.cumsum(counts)
    self._epochs = grain.MapDataset.range(sum(counts)).seed(seed).shuffle().repeat(None)
    self._sources = [
      grain.MapDataset.range(start, stop).seed((seed + number) % 2**32).shuffle().repeat(None)
      for number, (start, stop) in enumerate(rows.source_ranges, start=1)
    ]
    self._last_window = None, None

  def row(self, stream: int, number: int) -> int:
    """Returns the row that is example `number` (from 0) of a stream."""
    window, index = divmod(number, _WINDOW)
    if self._last_window[0] != window:
      self._last_window = window, self._deal(window)
    return self._last_window[1][stream][index]

  def digest(self) -> str:
    """Returns a text that differs between orders.

    It also differs if another version of Grain makes another order from the same seed.
    """
    # Saved states hold this digest, so its form must stay: example by example, over all streams.
    first = [
      [self.row(stream, number) for stream in range(self._num_streams)]
      for number in range(_DIGEST_EXAMPLES)
    ]
    return hashlib.blake2b(json.dumps(first).encode(), digest_size=8).hexdigest()

  def _deal(self, window):
    """The rows of a window for each stream, each in the order of the epoch."""
    size = self._num_streams * _WINDOW
    rows = [self._shuffled(window * size + index) for index in range(size)]
    lengths = [int(self._rows.lengths[row]) for row in rows]
    longest_first = sorted(range(size), key=lambda index: -lengths[index])
    dealt = deal_evenly(longest_first, lengths, self._num_streams)
    return [[rows[index] for index in sorted(indices)] for indices in dealt]

  def _shuffled(self, index):
    """The row with this index in the endless order of all streams together."""
    epoch, chosen = index // int(self._ends[-1]), self._epochs[index]
    source = int(np.searchsorted(self._ends, chosen, side="right"))
    count = self._counts[source]
    index_in_source = epoch * count + chosen - (int(self._ends[source]) - count)
    return int(self._sources[source][index_in_source])
