"""Packs examples into rows, first-fit, over three budgets: tokens, clips and image tiles.

Several rows are filled side by side. An example goes into the first one that has room for it; if
none has, it begins a new one. If more tokens are held than a few full rows have, the fullest row
leaves.

  rows of 10 tokens, two rows' worth is held, examples of 6, 7, 3:   [6 3] [7]
  then one of 5:                                                     [7] [5], and [6 3] leaves

The number of rows is not bounded: some may be next to empty, and yet without room for one more
image in the shard where it would stand. Clips and tiles are counted for each shard of the row (see
`sharded_rows`), since that is where there is room for so many.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.batches.examples import Example
from videochat_flash_jax.data.batches.sharded_rows import RowShape, shard_row
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError

NUM_HELD = 4  # rows' worth of tokens; more waste less room, and hold more frames in memory


class Packed(NamedTuple):
  """An example in a row, its number in its stream, and the row of the mixture read for it."""

  number: int
  source_row: int
  example: Example


class _Bin:
  """A row that is being filled."""

  def __init__(self, layout):
    self.packed: list[Packed] = []
    self.num_tokens = 0
    self._layout = layout
    self._needs = np.zeros((2, layout.num_shards), np.int64)

  def add(self, item: Packed) -> bool:
    """Puts an example in, if it fits."""
    example, layout = item.example, self._layout
    if self.num_tokens + len(example.token_ids) > layout.tokens:
      return False
    needs = layout.needs(example.visual_index, len(example.frames), self.num_tokens)
    if (self._needs + needs > layout.room).any():
      return False
    self.packed.append(item)
    self.num_tokens += len(example.token_ids)
    self._needs += needs
    return True


class RowPacker:
  """Takes examples, and gives rows."""

  def __init__(self, layout: RowShape, num_held: int = NUM_HELD):
    """Begins without any row.

    Args:
      layout: of a row.
      num_held: how many full rows there are tokens of in those that are being filled, at most.
    """
    self._layout, self._most_tokens = layout, num_held * layout.tokens
    self._bins: list[_Bin] = []

  @property
  def unfinished(self) -> list[list[list[int]]]:
    """Number and source row of the examples in each row that is being filled."""
    return [[[item.number, item.source_row] for item in bin.packed] for bin in self._bins]

  def add(self, item: Packed) -> list[Packed] | None:
    """Takes an example, which fits a row by itself; gives a row if one had to leave."""
    self.put(item)
    if sum(bin.num_tokens for bin in self._bins) <= self._most_tokens:
      return None
    fullest = max(self._bins, key=lambda bin: bin.num_tokens)
    self._bins.remove(fullest)
    return fullest.packed

  def put(self, item: Packed):
    """Puts an example, which fits a row by itself, into the first one that has room for it."""
    if not any(bin.add(item) for bin in self._bins):
      self.put_together([item])

  def put_together(self, items: Sequence[Packed]):
    """Begins a row with examples that were together in one before.

    Raises:
      InputError: they do not fit it any more, since they were changed.
    """
    new = _Bin(self._layout)
    if not all(new.add(item) for item in items):
      rows = ", ".join(str(item.source_row) for item in items)
      raise InputError(
        f"rows {rows} of the mixture were packed together, but their videos or images have changed "
        "and do not fit any more; bring the old ones back, or begin without the state"
      )
    self._bins.append(new)


def write_row(packed: Sequence[Packed], layout: RowShape, into: dict, number: int):
  """Writes a row's examples, one behind the other, into row `number` of `sharded_rows.empty_rows`.

  Segments are numbered from 1. What is left is padding: segment 0, nothing learnt, position 0.
  """
  examples = [item.example for item in packed]
  row = {
    "token_ids": np.zeros(layout.tokens, np.int32),
    "labels": np.full(layout.tokens, IGNORE_LABEL, np.int32),
    "visual_index": np.full(layout.tokens, -1, np.int32),
    "positions": np.zeros(layout.tokens, np.int32),
    "segment_ids": np.zeros(layout.tokens, np.int32),
  }
  clips = [clip for example in examples for clip in example.frames]
  tiles = [tile for example in examples for tile in example.tiles]
  offset, clips_before, tiles_before = 0, 0, 0
  for segment, example in enumerate(examples, start=1):
    place = slice(offset, offset + len(example.token_ids))
    for name in ("token_ids", "labels", "positions"):
      row[name][place] = getattr(example, name)
    row["segment_ids"][place] = segment
    is_tile = example.visual_index >= len(example.frames) * layout.clip_tokens
    behind = len(clips) + tiles_before - len(example.frames)
    first = np.where(is_tile, behind, clips_before).astype(np.int32) * layout.clip_tokens
    row["visual_index"][place] = np.where(
      example.visual_index >= 0, example.visual_index + first, np.int32(-1)
    )
    offset = place.stop
    clips_before += len(example.frames)
    tiles_before += len(example.tiles)
  shard_row(row, clips, tiles, layout, into, number)
