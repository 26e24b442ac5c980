"""Grain pipelines: from examples to batches of fixed shapes, the same for the same seed."""

import functools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from videochat_flash_jax.data.conversation import IGNORE_LABEL

Example = dict[str, np.ndarray]

_ENDLESS = 1 << 40
_PACKING_BINS = 16  # Rows filled side by side: more waste less room, and take more memory.
_TOKEN_FIELDS = ("token_ids", "labels", "visual_index")


def clip_batches(
  draw: Callable[[np.random.Generator], Example], num_examples: int, seed: int
) -> Iterator[Example]:
  """Yields batches of `num_examples` drawn examples, joined along their first axis (clips)."""

  def join(examples: Example) -> Example:
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in examples.items()}

  return iter(_examples(draw, seed).batch(num_examples).map(join))


def packed_batches(
  draw: Callable[[np.random.Generator], Example],
  num_rows: int,
  num_tokens: int,
  num_clips: int,
  clip_tokens: int,
  seed: int,
) -> Iterator[Example]:
  """Yields rows into which as many conversations are packed as fit.

  Args:
    draw: draws an example: `frames [C, F, S, S, 3]`, `token_ids`, `labels`, `visual_index` `[T]`.
    num_rows: B.
    num_tokens: T of a row.
    num_clips: C of a row.
    clip_tokens: visual tokens of a clip.
    seed: of the examples and their order.

  Returns:
    An endless iterator over `frames [B, C, F, S, S, 3]` and, `[B, T]`, `token_ids`, `labels`,
    `visual_index`, `positions` (from 0 in each segment) and `segment_ids` (0 in the padding).
  """
  packed = grain.experimental.FirstFitPackIterDataset(
    _examples(draw, seed),
    length_struct={"frames": num_clips, **dict.fromkeys(_TOKEN_FIELDS, num_tokens)},
    num_packing_bins=_PACKING_BINS,
    seed=seed,
  )
  return iter(packed.map(functools.partial(_finish_row, clip_tokens)).batch(num_rows))


def _examples(draw, seed):
  source = grain.MapDataset.range(_ENDLESS).seed(seed)
  return source.random_map(lambda _, rng: draw(rng)).to_iter_dataset()


def _finish_row(clip_tokens: int, row: Example) -> Example:
  """Counts visual tokens over the whole row, and marks the padding.

  Two segments and padding, two visual tokens a clip: visual_index [0 1 -1 | 0 1 -1 | 0] becomes
  [0 1 -1 | 2 3 -1 | -1].
  """
  segments, frame_segments = row["token_ids_segment_ids"], row["frames_segment_ids"]
  # Clips lie in the order of their segments, so a segment's first clip is found by bisection.
  clips_before = np.where(frame_segments > 0, frame_segments, np.iinfo(np.int32).max)
  first = np.searchsorted(clips_before, segments).astype(np.int32) * clip_tokens
  is_visual = (segments > 0) & (row["visual_index"] >= 0)
  return {
    "frames": row["frames"],
    "token_ids": row["token_ids"],
    "labels": np.where(segments > 0, row["labels"], np.int32(IGNORE_LABEL)),
    "visual_index": np.where(is_visual, row["visual_index"] + first, np.int32(-1)),
    "positions": row["token_ids_positions"],
    "segment_ids": segments,
  }
