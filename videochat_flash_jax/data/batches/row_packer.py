"""Packs examples into rows, first-fit, with three limits: tokens, clips and image tiles.

Several rows ("bins") are filled at the same time. An example goes into the first bin that has room
for it; if no bin has room, it starts a new one. When the bins together hold more tokens than
`num_held` full rows, the packer returns the fullest one.

  rows of 10 tokens, num_held 2, examples of 6, 7 and 3 tokens:   [6 3] [7]
  then one of 5 tokens:                                           [7] [5], and [6 3] is returned

The number of bins has no limit: a bin may be almost empty and still have no room for one more image
in the shard where the image's tokens would stand. Clips and tiles are counted for each shard of a
row (see `sharded_rows`), because each shard has its own limit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.batches.examples import Example
from videochat_flash_jax.data.batches.sharded_rows import RowShape, shard_row
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError

# In full rows. A larger number wastes fewer tokens on padding, but keeps more frames in memory.
NUM_HELD = 4


class Packed(NamedTuple):
  """An example, its number in its stream, and the row of the mixture that was read for it."""

  number: int
  source_row: int
  example: Example


class _Bin:
  """A row that is being filled."""

  def __init__(self, row_shape):
    self.packed: list[Packed] = []
    self.num_tokens = 0
    self._row_shape = row_shape
    self._needs = np.zeros((2, row_shape.num_shards), np.int64)

  def add(self, item: Packed) -> bool:
    """Adds an example if it fits, and returns whether it did."""
    example, row_shape = item.example, self._row_shape
    if self.num_tokens + len(example.token_ids) > row_shape.tokens:
      return False
    needs = row_shape.needs(example.visual_index, len(example.frames), self.num_tokens)
    if (self._needs + needs > row_shape.capacity).any():
      return False
    self.packed.append(item)
    self.num_tokens += len(example.token_ids)
    self._needs += needs
    return True


class RowPacker:
  """Takes examples one by one, and returns rows when they are full."""

  def __init__(self, row_shape: RowShape, num_held: int = NUM_HELD):
    """Starts without any bin.

    Args:
      row_shape: shape of a row.
      num_held: limit of the tokens in all bins together, in full rows.
    """
    self._row_shape, self._max_tokens = row_shape, num_held * row_shape.tokens
    self._bins: list[_Bin] = []

  @property
  def unfinished(self) -> list[list[list[int]]]:
    """Pairs (number, source row) of the examples in each bin."""
    return [[[item.number, item.source_row] for item in bin.packed] for bin in self._bins]

  def add(self, item: Packed) -> list[Packed] | None:
    """Takes an example that fits into an empty row; returns a row if the bins hold too much."""
    self.put(item)
    if sum(bin.num_tokens for bin in self._bins) <= self._max_tokens:
      return None
    fullest = max(self._bins, key=lambda bin: bin.num_tokens)
    self._bins.remove(fullest)
    return fullest.packed

  def put(self, item: Packed):
    """Puts an example that fits into an empty row into the first bin that has room for it."""
    if not any(bin.add(item) for bin in self._bins):
      self.begin_row([item])

  def begin_row(self, items: Sequence[Packed]):
    """Starts a new bin with these examples.

    Raises:
      InputError: the examples were in one row before, but do not fit any more, because their media
        have changed.
    """
    new = _Bin(self._row_shape)
    if not all(new.add(item) for item in items):
      rows = ", ".join(str(item.source_row) for item in items)
      raise InputError(
        f"rows {rows} of the mixture were packed together, but their videos or images have changed "
        "and do not fit any more; restore the old ones, or start without the saved state"
      )
    self._bins.append(new)


def write_row(packed: Sequence[Packed], row_shape: RowShape, batch: dict, number: int):
  """Writes the examples of a packed row, one after the other, into row `number` of a batch.

  Segments are numbered from 1. The remaining tokens are padding: segment 0, no label, position 0.

  Args:
    packed: the examples.
    row_shape: shape of the row.
    batch: arrays `[B, ...]` of `sharded_rows.empty_rows`.
    number: which row of the batch is written.
  """
  examples = [item.example for item in packed]
  row = {
    "token_ids": np.zeros(row_shape.tokens, np.int32),
    "labels": np.full(row_shape.tokens, IGNORE_LABEL, np.int32),
    "visual_index": np.full(row_shape.tokens, -1, np.int32),
    "positions": np.zeros(row_shape.tokens, np.int32),
    "segment_ids": np.zeros(row_shape.tokens, np.int32),
  }
  clips = [clip for example in examples for clip in example.frames]
  tiles = [tile for example in examples for tile in example.tiles]
  offset, clips_before, tiles_before = 0, 0, 0
  for segment, example in enumerate(examples, start=1):
    span = slice(offset, offset + len(example.token_ids))
    for name in ("token_ids", "labels", "positions"):
      row[name][span] = getattr(example, name)
    row["segment_ids"][span] = segment
    # In an example, tiles are counted after its own clips; in a row, after the clips of the row.
    is_tile = example.visual_index >= len(example.frames) * row_shape.clip_tokens
    tile_shift = (len(clips) - len(example.frames)) * row_shape.clip_tokens
    tile_shift += tiles_before * row_shape.tile_tokens
    shift = np.where(is_tile, tile_shift, clips_before * row_shape.clip_tokens)
    row["visual_index"][span] = np.where(
      example.visual_index >= 0, example.visual_index + shift, np.int32(-1)
    )
    offset = span.stop
    clips_before += len(example.frames)
    tiles_before += len(example.tiles)
  shard_row(row, clips, tiles, row_shape, batch, number)
