"""In which order the rows of a mixture are read, and by which stream.

An epoch is a shuffle of all rows; a source of weight 2 is in it twice, one of weight 0.5 by halves
in turn. Windows of that order are dealt to the streams so that all have about the same to do:

  order of an epoch         4 0 7 2 | 5 1 3 6          16 rows a stream in truth, here 2
  their lengths             9 1 8 2   ...
  dealt to two streams      0: 4 0 | ...   1: 7 2 | ...

Everything is computed from the seed and a number: nothing is kept, and any place can be begun at.
"""

import hashlib
import json

import grain
import numpy as np

from videochat_flash_jax.data.mixture.annotations import deal_evenly
from videochat_flash_jax.errors import InputError

_WINDOW = 16  # examples of a stream that are dealt at once
_NUM_TOLD = 100  # examples of each stream that tell orders apart


class ExampleOrder:
  """Which row is the n-th example of a stream."""

  def __init__(self, rows, seed: int, num_streams: int):
    """Computes nothing yet.

    Args:
      rows: `len(rows)`, `rows.lengths`, `rows.weights` and `rows.source_ranges` are looked at.
      seed: of the shuffles.
      num_streams: how many share the rows.

    Raises:
      InputError: the weight of a source leaves none of its rows.
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
          f"give at least {1 / span:.2g}, or leave the source out"
        )
    # A source's rows are counted through the epochs: with weight 0.5 the second shows other ones.
    self._counts = counts
    self._ends = np.cumsum(counts)
    self._epochs = grain.MapDataset.range(sum(counts)).seed(seed).shuffle().repeat(None)
    self._sources = [
      grain.MapDataset.range(start, stop).seed((seed + number) % 2**32).shuffle().repeat(None)
      for number, (start, stop) in enumerate(rows.source_ranges, start=1)
    ]
    self._last_window = None, None

  def row(self, stream: int, number: int) -> int:
    """The row that is example `number`, from 0, of a stream."""
    window, place = divmod(number, _WINDOW)
    if self._last_window[0] != window:
      self._last_window = window, self._deal(window)
    return self._last_window[1][stream][place]

  def digest(self) -> str:
    """Tells orders apart: also those that another version of Grain makes of one seed."""
    first = [[self.row(stream, n) for stream in range(self._num_streams)] for n in range(_NUM_TOLD)]
    return hashlib.blake2b(json.dumps(first).encode(), digest_size=8).hexdigest()

  def _deal(self, window):
    """The rows of a window for each stream, each in the order of the epoch."""
    size = self._num_streams * _WINDOW
    rows = [self._shuffled(window * size + place) for place in range(size)]
    lengths = [int(self._rows.lengths[row]) for row in rows]
    longest_first = sorted(range(size), key=lambda place: -lengths[place])
    dealt = deal_evenly(longest_first, lengths, self._num_streams)
    return [[rows[place] for place in sorted(places)] for places in dealt]

  def _shuffled(self, position):
    """The row at a position of the endless order of all streams together."""
    epoch, chosen = position // int(self._ends[-1]), self._epochs[position]
    source = int(np.searchsorted(self._ends, chosen, side="right"))
    count = self._counts[source]
    place = epoch * count + chosen - (int(self._ends[source]) - count)
    return int(self._sources[source][place])
