"""Rows laid out for a mesh that spreads their tokens: on the host, once.

A shard of a sequence takes visual tokens from its own clips and image tiles alone, so nothing
travels when they are spliced. Two clips of two tokens, a text token before and behind each, two
shards, in order:

  visual_index  -1 0 1 -1 | 2 3 -1 -1        clips  a b
  becomes       -1 0 1 -1 | 0 1 -1 -1        clips  a | b

A clip whose tokens lie in two shards is given to both. Tiles are counted behind the clips: in a row
behind all of its clips, in a shard behind its room for clips.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.zigzag import zigzag_order

PER_TOKEN = ("token_ids", "labels", "visual_index", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The shape of a row, and how a mesh splits it.

  Attributes:
    tokens: T of a row.
    clip_tokens: visual tokens of a clip, and of a tile.
    clips_per_shard: room for clips of 4 frames of each shard; what is left of it is black.
    tiles_per_shard: room for image tiles of each shard.
    num_shards: parts into which rows are split.
    zigzag: put the tokens into the order of `zigzag_order`.
  """

  tokens: int
  clip_tokens: int
  clips_per_shard: int
  tiles_per_shard: int = 0
  num_shards: int = 1
  zigzag: bool = False

  def __post_init__(self):
    if self.tokens % self.num_shards:
      raise InputError(
        f"rows of {self.tokens} tokens cannot be split into {self.num_shards} equal parts; "
        f"pad them to {-(-self.tokens // self.num_shards) * self.num_shards}"
      )

  @property
  def order(self) -> np.ndarray:
    """Which token stands at each place: int `[T]`."""
    return _order_and_shards(self.tokens, self.num_shards, self.zigzag)[0]

  @property
  def shard_of_token(self) -> np.ndarray:
    """In which shard each token of a row stands: int `[T]`."""
    return _order_and_shards(self.tokens, self.num_shards, self.zigzag)[1]

  def needs(self, visual_index: np.ndarray, num_clips: int, offset: int = 0) -> np.ndarray:
    """How many clips and tiles each shard needs for a piece of a row.

    Args:
      visual_index: `[L]` of the piece, counted from its own first clip.
      num_clips: of the piece; visual tokens behind them belong to tiles.
      offset: where in the row the piece begins.

    Returns:
      int `[2, num_shards]`: clips, and tiles.
    """
    (places,) = np.nonzero(visual_index >= 0)
    items = visual_index[places] // self.clip_tokens
    is_needed = np.zeros((max(items.max(initial=0) + 1, num_clips), self.num_shards), bool)
    is_needed[items, self.shard_of_token[places + offset]] = True
    return np.stack([is_needed[:num_clips].sum(axis=0), is_needed[num_clips:].sum(axis=0)])

  @property
  def room(self) -> np.ndarray:
    """What each shard may need: int `[2, 1]`, clips and tiles."""
    return np.array([[self.clips_per_shard], [self.tiles_per_shard]])


@functools.cache
def _order_and_shards(tokens, num_shards, zigzag):
  order = zigzag_order(tokens, num_shards) if zigzag else np.arange(tokens)
  shards = np.empty(tokens, np.int64)
  shards[order] = np.arange(tokens) * num_shards // tokens
  return order, shards


def empty_rows(
  layout: RowShape,
  num_rows: int,
  clip_shape: Sequence[int],
  tile_shape: Sequence[int],
  dtype: np.dtype = np.uint8,
) -> dict:
  """Arrays for `shard_row` to fill.

  Args:
    layout: of each row.
    num_rows: B.
    clip_shape: of a clip: (frames, side, side, 3), or (V, E) of its features.
    tile_shape: of a tile: (1, side, side, 3), or (V, E).
    dtype: of both.

  Returns:
    int32 `[B, T]` for each of `PER_TOKEN`; `frames [B, num_shards * clips_per_shard, *clip_shape]`,
    and, if there is room for any, `tiles [B, num_shards * tiles_per_shard, *tile_shape]`.
  """
  rows = {name: np.empty((num_rows, layout.tokens), np.int32) for name in PER_TOKEN}
  num_clips, num_tiles = layout.num_shards * layout.room[:, 0]
  rows["frames"] = np.zeros((num_rows, num_clips, *clip_shape), dtype)
  if num_tiles:
    rows["tiles"] = np.zeros((num_rows, num_tiles, *tile_shape), dtype)
  return rows


def shard_row(
  row: Mapping[str, np.ndarray],
  clips: Sequence[np.ndarray],
  tiles: Sequence[np.ndarray],
  layout: RowShape,
  into: Mapping[str, np.ndarray],
  number: int,
):
  """Writes one row, as it lies on the mesh, into row `number` of `empty_rows`.

  Args:
    row: `[T]` of `PER_TOKEN`, in order; `visual_index` counts `clips`, then `tiles`.
    clips: of the row, each of `clip_shape`.
    tiles: of the row, each of `tile_shape`.
    layout: of the row.
    into: arrays of `empty_rows`.
    number: which of their rows.

  Raises:
    InputError: a shard needs more clips or tiles than it has room for.
  """
  for name in PER_TOKEN:
    into[name][number] = row[name][layout.order]
  index, num_tokens = into["visual_index"][number], layout.tokens // layout.num_shards
  for shard in range(layout.num_shards):
    part = index[shard * num_tokens : (shard + 1) * num_tokens]
    is_visual = part >= 0
    items, own = np.unique(part[is_visual] // layout.clip_tokens, return_inverse=True)
    num_clips = int(np.searchsorted(items, len(clips)))
    needed = num_clips, len(items) - num_clips
    _check_room(needed, layout, f"row {number}", shard)
    own[own >= num_clips] += layout.clips_per_shard - num_clips
    part[is_visual] = own * layout.clip_tokens + part[is_visual] % layout.clip_tokens
    for place, item in enumerate(items[:num_clips]):
      into["frames"][number, shard * layout.clips_per_shard + place] = clips[item]
    for place, item in enumerate(items[num_clips:]):
      into["tiles"][number, shard * layout.tiles_per_shard + place] = tiles[item - len(clips)]


def _check_room(needed, layout, name, shard):
  for kind, count, room in zip(("clips", "tiles"), needed, layout.room[:, 0], strict=True):
    if count > room:
      raise InputError(
        f"{name} has {count} {kind} in part {shard} of its tokens, but {kind}_per_shard "
        f"is {room}; give more room, or pack fewer {kind}"
      )
