"""Lays out a whole batch for a mesh, as batches of training data are laid out row by row."""

from collections.abc import Mapping

import numpy as np

from videochat_flash_jax.data.batches.sharded_rows import (
  PER_TOKEN,
  RowShape,
  empty_rows,
  shard_row,
)


def shard_rows(batch: Mapping[str, np.ndarray], **layout) -> dict[str, np.ndarray]:
  """Lays out a batch for `parallel.layout.Layout`.

  Args:
    batch: `frames [B, C, F, S, S, 3]`, perhaps `tiles [B, I, 1, S, S, 3]`, and, `[B, T]`, the
      fields of `PER_TOKEN`.
    **layout: fields of `RowShape` other than `tokens`.

  Returns:
    The same fields, with the clips and tiles of all shards.

  Raises:
    InputError: the rows have no such parts, or a shard has more clips than there is room for.
  """
  num_rows, length = batch["token_ids"].shape
  layout = RowShape(length, **layout)
  clip_shape = batch["frames"].shape[2:]
  spread = empty_rows(layout, num_rows, clip_shape, (1, *clip_shape[1:]))
  tiles = batch.get("tiles", np.empty((num_rows, 0)))
  for number in range(num_rows):
    row = {name: batch[name][number] for name in PER_TOKEN}
    shard_row(row, batch["frames"][number], tiles[number], layout, spread, number)
  return spread
