r"""From a row of annotations to an example: frames, image tiles, tokens and labels.

  row       video of 100 s, "<image>\nWhat moves?", "A cat."
  frames    25 clips of 4 frames, one a second
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
  ANSWER_HEADER,
  IGNORE_LABEL,
  TokenizedText,
  encode_row,
  time_message,
)
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.data.text.tokenizer_of_process import TokenizerOfProcess
from videochat_flash_jax.data.text.visual_slots import open_slots


class Example(NamedTuple):
  """A conversation with what is seen.

  Attributes:
    frames: uint8 `[C, 4, S, S, 3]`, clips of four frames; or features, bfloat16 `[C, V, E]`.
    tiles: uint8 `[I, 1, S, S, 3]`, views of images; or features, bfloat16 `[I, V, E]`.
    token_ids: int32 `[T]`, 0 where a visual token will stand.
    labels: int32 `[T]`.
    visual_index: int32 `[T]`: which visual token, those of clips first, or -1.
    positions: int32 `[T]`.
    is_damaged: whether frames of the video stand in for others that cannot be read.
  """

  frames: np.ndarray
  tiles: np.ndarray
  token_ids: np.ndarray
  labels: np.ndarray
  visual_index: np.ndarray
  positions: np.ndarray
  is_damaged: bool = False


class Seen(NamedTuple):
  """What a row shows, before its text is read.

  Attributes:
    frames: as in `Example`.
    tiles: as in `Example`.
    counts: visual tokens of each video or image.
    order: which visual token stands where, if not one after the other.
    message: of the time.
    is_damaged: as in `Example`.
  """

  frames: np.ndarray
  tiles: np.ndarray
  counts: list[int]
  order: np.ndarray | None = None
  message: str = ""
  is_damaged: bool = False


class ExampleReader(TokenizerOfProcess):
  """Reads rows of annotations, with their media."""

  def __init__(
    self,
    config: ExampleConfig,
    layout: RowShape,
    make_tokenizer: Callable[[], Tokenizer],
    features: FeatureStore | None = None,
  ):
    """Opens nothing yet.

    Args:
      config: how rows become examples.
      layout: of a row of tokens, which each example has to fit by itself.
      make_tokenizer: gives the tokenizer, once in each process.
      features: to take in place of frames and tiles, which are then not read.
    """
    super().__init__(make_tokenizer)
    self._config, self._layout, self._features = config, layout, features

  def read(self, row: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Reads a row, with whole paths of its media; `rng` draws the positions.

    Raises:
      BrokenRow: the row or its media cannot be used.
    """
    seen = self._see(row)
    text = self._encode(row, seen.message)
    token_ids, visual_index = open_slots(text.ids, seen.counts)
    labels = np.full(len(token_ids), IGNORE_LABEL, np.int32)
    labels[visual_index < 0] = text.labels[text.ids >= 0]
    if seen.order is not None:
      visual_index[visual_index >= 0] = seen.order
    length = self._layout.tokens
    per_token = [values[:length] for values in (token_ids, labels, visual_index)]
    positions = skipped_positions(len(per_token[0]), self._config.position_skip, rng)
    example = Example(seen.frames, seen.tiles, *per_token, positions, seen.is_damaged)
    self._check_fits(example, len(token_ids))
    return example

  def _see(self, row) -> Seen:
    tokens = self._layout.clip_tokens
    clip_shape, tile_shape, dtype = seen_as(self._config, self._features)
    no_clips, no_tiles = np.empty((0, *clip_shape), dtype), np.empty((0, *tile_shape), dtype)
    if row.get("video") is not None:
      video = read_row_video(row, self._config, self._features)
      message = time_message(self._config.time_message, video.seconds, video.frame_seconds)
      counts = [len(video.clips) * tokens]
      return Seen(video.clips, no_tiles, counts, None, message, video.is_damaged)
    self._check_num_images(row)
    images = read_row_images(row)
    if not images:
      return Seen(no_clips, no_tiles, [])
    grids = choose_grids(images, self._config)
    tiles = np.concatenate([self._tiles(*view) for view in zip(images, grids, strict=True)])
    if len(images) > 1:
      return Seen(no_clips, tiles, [tokens] * len(images))
    order = sequence_order(*grids[0], tokens)
    return Seen(no_clips, tiles, [len(order)], order)

  def _check_num_images(self, row):
    """Refuses more images than a row has tokens for, before all of them are read."""
    num_images = len(media_paths(row, "image")) if row.get("image") is not None else 0
    if num_images * self._layout.clip_tokens > self._layout.tokens:
      raise BrokenRow(
        "too long",
        f"{num_images} images of {self._layout.clip_tokens} tokens, but a row has "
        f"{self._layout.tokens}; give longer rows, or fewer images",
      )

  def _tiles(self, image, grid):
    if self._features is None:
      return read_tiles(image, grid, self._config.image_size)
    return tile_features(image, grid, self._features)

  def _encode(self, row, message) -> TokenizedText:
    template, style = self._config.template, self._config.label_style
    with because("bad conversations"):
      try:
        return encode_row(row, self.tokenizer, template, message, style)
      except (TypeError, UnicodeError) as error:  # JSON may hold half of a surrogate pair
        raise BrokenRow("bad conversations", "a text is not valid UTF-8; mend it") from error

  def _has_answer(self, example) -> bool:
    """Whether any token of an answer is learnt: neither a mark nor the header of its turn."""
    tokenizer = self.tokenizer
    marks = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_id
    is_answer = (example.labels != IGNORE_LABEL) & ~np.isin(example.labels, marks)
    header_length = len(tokenizer.encode(ANSWER_HEADER))
    for start in np.flatnonzero(example.token_ids == tokenizer.im_start_id):
      is_answer[start : start + header_length] = False
    return bool(is_answer.any())

  def _check_fits(self, example, num_tokens):
    """Refuses an example that would lose a part of what is seen, or all answers."""
    num_clips, room = len(example.frames), self._layout.room
    num_visual = (num_clips + len(example.tiles)) * self._layout.clip_tokens
    if (example.visual_index >= 0).sum() < num_visual or not self._has_answer(example):
      raise BrokenRow(
        "too long",
        f"{num_tokens} tokens, {num_visual} of them visual, but a row has {self._layout.tokens}; "
        "give longer rows, or fewer frames",
      )
    needs = self._layout.needs(example.visual_index, num_clips)
    for kind, needed, space in zip(("clips", "tiles"), needs.max(axis=1), room[:, 0], strict=True):
      if needed > space:
        raise BrokenRow(
          "too long",
          f"a part of a row needs {needed} {kind}, but {kind}_per_shard is {space}; give more",
        )


def seen_as(
  config: ExampleConfig, features: FeatureStore | None
) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
  """Shape of a clip, that of a tile, and the dtype of both: of pixels, or of features."""
  if features is not None:
    return features.clip_shape, features.clip_shape, np.dtype(ml_dtypes.bfloat16)
  picture = (config.image_size, config.image_size, 3)
  return (CLIP_FRAMES, *picture), (1, *picture), np.dtype(np.uint8)


def skipped_positions(length: int, most: int, rng: np.random.Generator) -> np.ndarray:
  """Positions that jump, so that short examples teach late positions, too.

  All move by a first step, those behind a random place by a second one that is no smaller, both at
  most `most`: of 5 tokens, steps 2 and 4, place 3: 2 3 4 7 8. As `pos_skipping_range` of
  LLaVA-NeXT's training code.
  """
  place = rng.integers(length, endpoint=True)
  first = rng.integers(most, endpoint=True)
  second = rng.integers(first, most, endpoint=True)
  positions = np.arange(length, dtype=np.int32)
  return positions + np.where(positions < place, first, second).astype(np.int32)
