"""Rows of a batch laid out for a mesh that spreads their tokens: on the host, once.

A shard of a sequence takes visual tokens from its own clips alone, so nothing travels when they are
spliced. Two clips of two tokens, a text token before and behind each, two shards, in order:

  visual_index  -1 0 1 -1 | 2 3 -1 -1        clips  a b
  becomes       -1 0 1 -1 | 0 1 -1 -1        clips  a | b

A clip whose tokens lie in two shards is given to both.
"""

from collections.abc import Mapping

import numpy as np

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.zigzag import zigzag_order

_PER_TOKEN = ("token_ids", "labels", "visual_index", "positions", "segment_ids")


def spread_rows(
  batch: Mapping[str, np.ndarray],
  *,
  num_shards: int,
  zigzag: bool,
  clip_tokens: int,
  clips_per_shard: int,
) -> dict[str, np.ndarray]:
  """Lays out a batch of `data.pipeline` for `parallel.layout.Layout`.

  Args:
    batch: `frames [B, C, F, S, S, 3]`, and `[B, T]`: `token_ids`, `labels`, `visual_index`,
      `positions`, `segment_ids`.
    num_shards: parts into which rows are split.
    zigzag: put the tokens into the order of `zigzag_order`.
    clip_tokens: visual tokens of a clip.
    clips_per_shard: room for clips of each shard; what is left of it is black.

  Returns:
    The same fields, `frames [B, num_shards * clips_per_shard, F, S, S, 3]`.

  Raises:
    InputError: the rows have no such parts, or a shard has more clips than there is room for.
  """
  length = batch["token_ids"].shape[1]
  if length % num_shards:
    raise InputError(
      f"rows of {length} tokens cannot be split into {num_shards} equal parts; "
      f"pad them to {-(-length // num_shards) * num_shards}"
    )
  order = zigzag_order(length, num_shards) if zigzag else np.arange(length)
  spread = {name: batch[name][:, order] for name in _PER_TOKEN}
  frames, index = [], np.full_like(spread["visual_index"], -1)
  for row, clips in enumerate(batch["frames"]):
    for shard in range(num_shards):
      tokens = slice(shard * length // num_shards, (shard + 1) * length // num_shards)
      visual = spread["visual_index"][row, tokens]
      needed = np.unique(visual[visual >= 0] // clip_tokens)
      if len(needed) > clips_per_shard:
        raise InputError(
          f"row {row} has {len(needed)} clips in part {shard} of its tokens, but clips_per_shard "
          f"is {clips_per_shard}; give more room, or pack fewer clips"
        )
      own = np.searchsorted(needed, visual // clip_tokens) * clip_tokens + visual % clip_tokens
      index[row, tokens] = np.where(visual >= 0, own, -1)
      black = np.zeros((clips_per_shard - len(needed), *clips.shape[1:]), clips.dtype)
      frames.append(np.concatenate([clips[needed], black]))
  frames = np.stack(frames).reshape(len(index), -1, *batch["frames"].shape[2:])
  return {**spread, "visual_index": index, "frames": frames}
