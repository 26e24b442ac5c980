"""Arranges packed rows for a mesh that splits their tokens: once, on the host.

Each shard of a row gets its own clips and image tiles: those whose tokens it holds. So no visual
token is sent between devices when the visual tokens are spliced into the text. For example, with
two clips of two tokens each, text tokens around them, two shards and no zigzag:

  visual_index  -1 0 1 -1 | 2 3 -1 -1        clips  a b
  becomes       -1 0 1 -1 | 0 1 -1 -1        clips  a | b

A clip whose tokens lie in two shards is copied to both. In `visual_index`, tiles are counted after
clips: in a row, after all clips of the row; in a shard, after the `clips_per_shard` of the shard.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.zigzag import zigzag_order

# With stored features, these fields of a batch take the place of pixels.
STORED_FEATURES = {"frames": "features", "tiles": "tile_features"}
PER_TOKEN = ("token_ids", "labels", "visual_index", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The shape of a packed row, and how a mesh splits it.

  Attributes:
    tokens: T, the tokens of a row.
    clip_tokens: the visual tokens of a clip, `VideoChatFlashConfig.clip_tokens`.
    clips_per_shard: largest number of clips of 4 frames in each shard; unused ones are black.
    tiles_per_shard: largest number of image tiles in each shard.
    num_shards: number of parts into which a row is split.
    zigzag: whether the tokens are put into the order of `zigzag_order`.
    tile_tokens: the visual tokens of a tile, `VideoChatFlashConfig.tile_tokens`; None: as many as
      of a clip.
  """

  tokens: int
  clip_tokens: int
  clips_per_shard: int
  tiles_per_shard: int = 0
  num_shards: int = 1
  zigzag: bool = False
  tile_tokens: int | None = None

  def __post_init__(self):
    if self.tile_tokens is None:
      object.__setattr__(self, "tile_tokens", self.clip_tokens)
    if self.tokens % self.num_shards:
      raise InputError(
        f"rows of {self.tokens} tokens cannot be split into {self.num_shards} equal parts; "
        f"pad them to {-(-self.tokens // self.num_shards) * self.num_shards}"
      )

  @property
  def order(self) -> np.ndarray:
    """Order of the tokens on the mesh: int `[T]`, `x[order]` is the rearranged array."""
    return _order_and_shards(self.tokens, self.num_shards, self.zigzag)[0]

  @property
  def shard_of_token(self) -> np.ndarray:
    """The shard of each token of a row: int `[T]`, for tokens in their original order."""
    return _order_and_shards(self.tokens, self.num_shards, self.zigzag)[1]

  def find(self, visual_index: np.ndarray, num_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the clip or tile that each visual token belongs to, and which of its tokens it is.

    With clips of 3 tokens and tiles of 2, the tokens of 1 clip and 2 tiles are

        index   0 1 2 3 4 5 6
        item    0 0 0 1 1 2 2
        token   0 1 2 0 1 0 1

    Args:
      visual_index: int `[N]`, indices of visual tokens.
      num_clips: number of clips; items from this number on are tiles.
    """
    of_clips = num_clips * self.clip_tokens
    clip, clip_token = np.divmod(visual_index, self.clip_tokens)
    tile, tile_token = np.divmod(visual_index - of_clips, self.tile_tokens)
    is_clip = visual_index < of_clips
    return np.where(is_clip, clip, num_clips + tile), np.where(is_clip, clip_token, tile_token)

  def first_token(self, items: np.ndarray, num_clips: int) -> np.ndarray:
    """The inverse of `find`: the index of the first visual token of each clip or tile."""
    num_tiles = np.maximum(items - num_clips, 0)
    return np.minimum(items, num_clips) * self.clip_tokens + num_tiles * self.tile_tokens

  def needs(self, visual_index: np.ndarray, num_clips: int, offset: int = 0) -> np.ndarray:
    """Counts the clips and tiles that each shard needs for an example in a row.

    Args:
      visual_index: `[L]`, of the example, counted from its own first clip.
      num_clips: number of clips of the example; visual tokens after them belong to tiles.
      offset: position in the row at which the example begins.

    Returns:
      int `[2, num_shards]`: the number of clips, and of tiles.
    """
    (positions,) = np.nonzero(visual_index >= 0)
    items = self.find(visual_index[positions], num_clips)[0]
    is_needed = np.zeros((max(items.max(initial=0) + 1, num_clips), self.num_shards), bool)
    is_needed[items, self.shard_of_token[positions + offset]] = True
    return np.stack([is_needed[:num_clips].sum(axis=0), is_needed[num_clips:].sum(axis=0)])

  @property
  def capacity(self) -> np.ndarray:
    """Largest number of clips and of tiles in a shard: int `[2, 1]`."""
    return np.array([[self.clips_per_shard], [self.tiles_per_shard]])


@functools.cache
def _order_and_shards(tokens, num_shards, zigzag):
  order = zigzag_order(tokens, num_shards) if zigzag else np.arange(tokens)
  shards = np.empty(tokens, np.int64)
  shards[order] = np.arange(tokens) * num_shards // tokens
  return order, shards


def empty_rows(
  row_shape: RowShape,
  num_rows: int,
  clip_shape: Sequence[int],
  tile_shape: Sequence[int],
  dtype: np.dtype = np.uint8,
) -> dict:
  """Makes the arrays of a batch, which `shard_row` fills.

  Args:
    row_shape: shape of each row.
    num_rows: B.
    clip_shape: shape of a clip: (frames, side, side, 3), or (V, E) for its features.
    tile_shape: shape of a tile: (1, side, side, 3), or (V, E) for its features.
    dtype: dtype of clips and tiles.

  Returns:
    int32 `[B, T]` for each of `PER_TOKEN`; `frames [B, num_shards * clips_per_shard, *clip_shape]`;
    and, unless `tiles_per_shard` is 0, `tiles [B, num_shards * tiles_per_shard, *tile_shape]`.
  """
  rows = {name: np.empty((num_rows, row_shape.tokens), np.int32) for name in PER_TOKEN}
  num_clips, num_tiles = row_shape.num_shards * row_shape.capacity[:, 0]
  rows["frames"] = np.zeros((num_rows, num_clips, *clip_shape), dtype)
  if num_tiles:
    rows["tiles"] = np.zeros((num_rows, num_tiles, *tile_shape), dtype)
  return rows


def shard_row(
  row: Mapping[str, np.ndarray],
  clips: Sequence[np.ndarray],
  tiles: Sequence[np.ndarray],
  row_shape: RowShape,
  batch: Mapping[str, np.ndarray],
  number: int,
):
  """Arranges one packed row for the mesh, and writes it into row `number` of a batch.

  Args:
    row: arrays `[T]` of `PER_TOKEN` in their original order; `visual_index` counts the tokens of
      `clips` first, then those of `tiles`.
    clips: the clips of the row, each of `clip_shape`.
    tiles: the tiles of the row, each of `tile_shape`.
    row_shape: shape of the row.
    batch: arrays of `empty_rows`.
    number: which row of the batch is written.

  Raises:
    InputError: a shard needs more clips than `clips_per_shard`, or more tiles than
      `tiles_per_shard`.
  """
  for name in PER_TOKEN:
    batch[name][number] = row[name][row_shape.order]
  index, num_tokens = batch["visual_index"][number], row_shape.tokens // row_shape.num_shards
  for shard in range(row_shape.num_shards):
    part = index[shard * num_tokens : (shard + 1) * num_tokens]
    is_visual = part >= 0
    item, token = row_shape.find(part[is_visual], len(clips))
    # `items`: the clips and tiles of this shard. `own`: for each visual token, which of them.
    items, own = np.unique(item, return_inverse=True)
    num_clips = int(np.searchsorted(items, len(clips)))
    needed = num_clips, len(items) - num_clips
    _check_capacity(needed, row_shape, f"row {number}", shard)
    own[own >= num_clips] += row_shape.clips_per_shard - num_clips
    part[is_visual] = row_shape.first_token(own, row_shape.clips_per_shard) + token
    for offset, item in enumerate(items[:num_clips]):
      batch["frames"][number, shard * row_shape.clips_per_shard + offset] = clips[item]
    for offset, item in enumerate(items[num_clips:]):
      batch["tiles"][number, shard * row_shape.tiles_per_shard + offset] = tiles[item - len(clips)]


def _check_capacity(needed, row_shape, name, shard):
  for kind, count, most in zip(("clips", "tiles"), needed, row_shape.capacity[:, 0], strict=True):
    if count > most:
      raise InputError(
        f"{name} has {count} {kind} in part {shard} of its tokens, but {kind}_per_shard "
        f"is {most}; give a larger {kind}_per_shard, or pack fewer {kind}"
      )
