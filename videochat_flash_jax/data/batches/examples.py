r"""Turns an annotation row into an example: frames, image tiles, tokens and labels.

  row       a video of 100 s, "<image>\nWhat moves?", "A cat."
  frames    25 clips of 4 frames, one frame a second
  tokens    [the time message and the question, 1,600 visual tokens, the answer]

The rules are those of the official training code; see `annotations`, `frame_sampling` and
`conversation`. A row that cannot be used raises `BrokenRow`, whatever is wrong with it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import (
  choose_grids,
  read_row_images,
  read_row_video,
  read_tiles,
  tile_features,
)
from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.media.image_tiling import sequence_order
from videochat_flash_jax.data.mixture.annotations import media_paths
from videochat_flash_jax.data.mixture.broken import BrokenRow, because
from videochat_flash_jax.data.text.conversation import (
  IGNORE_LABEL,
  TokenizedText,
  encode_row,
  time_message,
)
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.data.text.tokenizer_of_process import TokenizerOfProcess
from videochat_flash_jax.data.text.visual_slots import open_slots


class Example(NamedTuple):
  """A tokenized conversation with its frames and image tiles.

  Attributes:
    frames: uint8 `[C, 4, S, S, 3]`, clips of four frames; or their features, bfloat16 `[C, V, E]`.
    tiles: uint8 `[I, 1, S, S, 3]`, tiles and base views of images; or their features, bfloat16
      `[I, V, E]`.
    token_ids: int32 `[T]`, 0 where a visual token will be inserted.
    labels: int32 `[T]`.
    visual_index: int32 `[T]`: index of the visual token, or -1 for a text token. The visual tokens
      of clips are counted first, then those of tiles.
    positions: int32 `[T]`, rotary positions.
    is_damaged: whether some frames of the video could not be read, so that other frames replace
      them.
    is_cut: whether words of an answer are missing, because the row is too long for a training row.
  """

  frames: np.ndarray
  tiles: np.ndarray
  token_ids: np.ndarray
  labels: np.ndarray
  visual_index: np.ndarray
  positions: np.ndarray
  is_damaged: bool = False
  is_cut: bool = False


class RowMedia(NamedTuple):
  """The frames or tiles of an annotation row, before its text is tokenized.

  Attributes:
    frames: as in `Example`.
    tiles: as in `Example`.
    counts: number of visual tokens of each video or image.
    order: int `[sum(counts)]`, the order in which visual tokens appear in the text; None for
      0, 1, 2 and so on.
    message: the time message, "" if there is none.
    is_damaged: as in `Example`.
  """

  frames: np.ndarray
  tiles: np.ndarray
  counts: list[int]
  order: np.ndarray | None = None
  message: str = ""
  is_damaged: bool = False


class ExampleReader(TokenizerOfProcess):
  """Reads annotation rows with their media."""

  def __init__(
    self,
    config: ExampleConfig,
    row_shape: RowShape,
    make_tokenizer: Callable[[], Tokenizer],
    features: FeatureStore | None = None,
  ):
    """Stores the settings; nothing is opened yet.

    Args:
      config: how annotation rows become examples.
      row_shape: shape of a training row. Each example must fit into an empty one.
      make_tokenizer: returns the tokenizer; called once in each process.
      features: features to use instead of frames and tiles, which are then not read.
    """
    super().__init__(make_tokenizer)
    self._config, self._row_shape, self._features = config, row_shape, features

  def read(self, row: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Reads one annotation row.

    Args:
      row: the annotation row; the paths of its media must be complete.
      rng: draws the positions.

    Raises:
      BrokenRow: the row or its media cannot be used.
    """
    media = self._read_media(row)
    text = self._encode(row, media.message)
    token_ids, visual_index = open_slots(text.ids, media.counts)
    labels = np.full(len(token_ids), IGNORE_LABEL, np.int32)
    is_answer = np.zeros(len(token_ids), bool)
    for whole, of_text in ((labels, text.labels), (is_answer, text.is_answer)):
      whole[visual_index < 0] = of_text[text.ids >= 0]
    if media.order is not None:
      visual_index[visual_index >= 0] = media.order
    length = self._row_shape.tokens
    per_token = [values[:length] for values in (token_ids, labels, visual_index)]
    positions = skipped_positions(len(per_token[0]), self._config.position_skip, rng)
    is_cut = bool(is_answer[length:].any())
    example = Example(media.frames, media.tiles, *per_token, positions, media.is_damaged, is_cut)
    self._check_fits(example, len(token_ids), is_answer[:length].any())
    return example

  def _read_media(self, row) -> RowMedia:
    clip_tokens, tile_tokens = self._row_shape.clip_tokens, self._row_shape.tile_tokens
    clip_shape, tile_shape, dtype = media_shapes(self._config, self._features)
    no_clips, no_tiles = np.empty((0, *clip_shape), dtype), np.empty((0, *tile_shape), dtype)
    if row.get("video") is not None:
      video = read_row_video(row, self._config, self._features)
      message = time_message(self._config.time_message, video.seconds, video.frame_seconds)
      counts = [len(video.clips) * clip_tokens]
      return RowMedia(video.clips, no_tiles, counts, None, message, video.is_damaged)
    self._check_num_images(row)
    images = read_row_images(row)
    if not images:
      return RowMedia(no_clips, no_tiles, [])
    grids = choose_grids(images, self._config)
    tiles = np.concatenate(
      [self._tiles(image, grid) for image, grid in zip(images, grids, strict=True)]
    )
    if len(images) > 1:
      return RowMedia(no_clips, tiles, [tile_tokens] * len(images))
    order = sequence_order(*grids[0], tile_tokens)
    return RowMedia(no_clips, tiles, [len(order)], order)

  def _check_num_images(self, row):
    """Raises `BrokenRow` if a row has no room for so many images, before any of them is read."""
    num_images = len(media_paths(row, "image")) if row.get("image") is not None else 0
    if num_images * self._row_shape.tile_tokens > self._row_shape.tokens:
      raise BrokenRow(
        "too long",
        f"{num_images} images of {self._row_shape.tile_tokens} tokens, but a row has "
        f"{self._row_shape.tokens}; give longer rows, or fewer images",
      )

  def _tiles(self, image, grid):
    if self._features is None:
      return read_tiles(image, grid, self._config.image_size)
    return tile_features(image, grid, self._features)

  def _encode(self, row, message) -> TokenizedText:
    template, style = self._config.template, self._config.label_style
    with because("bad conversations"):
      return encode_row(row, self.tokenizer, template, message, style)

  def _check_fits(self, example, num_tokens, has_answer):
    """Raises `BrokenRow` if the cut to the row's length removed visual tokens or all answers."""
    num_clips, capacity = len(example.frames), self._row_shape.capacity
    num_visual = self._row_shape.first_token(num_clips + len(example.tiles), num_clips)
    if (example.visual_index >= 0).sum() < num_visual or not has_answer:
      raise BrokenRow(
        "too long",
        f"{num_tokens} tokens, {num_visual} of them visual, but a row has "
        f"{self._row_shape.tokens}; give longer rows, or fewer frames",
      )
    needs = self._row_shape.needs(example.visual_index, num_clips).max(axis=1)
    for kind, needed, available in zip(("clips", "tiles"), needs, capacity[:, 0], strict=True):
      if needed > available:
        raise BrokenRow(
          "too long",
          f"a part of a row needs {needed} {kind}, but {kind}_per_shard is {available}; give more",
        )


def media_shapes(
  config: ExampleConfig, features: FeatureStore | None
) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
  """Returns the shape of a clip, the shape of a tile, and the dtype of both.

  With pixels: `(4, S, S, 3)`, `(1, S, S, 3)`, uint8. With features: `(V, E)` twice, bfloat16.
  """
  if features is not None:
    return features.clip_shape, features.clip_shape, np.dtype(ml_dtypes.bfloat16)
  picture = (config.image_size, config.image_size, 3)
  return (CLIP_FRAMES, *picture), (1, *picture), np.dtype(np.uint8)


def skipped_positions(length: int, max_skip: int, rng: np.random.Generator) -> np.ndarray:
  """Draws rotary positions that jump, so that short examples also train late positions.

  All tokens are shifted by a first skip. The tokens from a random index on are shifted by a second
  skip instead, which is not smaller. Both are at most `max_skip`. This is `pos_skipping_range` of
  LLaVA-NeXT's training code.

      5 tokens, skips 2 and 4, second skip from index 3 on:   2 3 4 7 8

  Args:
    length: T.
    max_skip: the largest skip.
    rng: draws the index and both skips.

  Returns:
    int32 `[T]`, rising.
  """
  second_start = rng.integers(length, endpoint=True)
  first = rng.integers(max_skip, endpoint=True)
  second = rng.integers(first, max_skip, endpoint=True)
  positions = np.arange(length, dtype=np.int32)
  return positions + np.where(positions < second_start, first, second).astype(np.int32)
