"""Arranges a whole batch for a mesh, as `shard_row` arranges one row of training data."""

from collections.abc import Mapping

import numpy as np

from videochat_flash_jax.data.batches.sharded_rows import (
  PER_TOKEN,
  RowShape,
  empty_rows,
  shard_row,
)


def shard_rows(batch: Mapping[str, np.ndarray], **row_shape) -> dict[str, np.ndarray]:
  """Arranges a batch for `parallel.layout.Layout`.

  Args:
    batch: `frames [B, C, F, S, S, 3]`, optionally `tiles [B, I, 1, S, S, 3]`, and the fields of
      `PER_TOKEN`, each `[B, T]`.
    **row_shape: fields of `RowShape` other than `tokens`.

  Returns:
    The same fields, with the clips and tiles of all shards.

  Raises:
    InputError: the rows cannot be split into such parts, or a shard needs more clips or tiles than
      it may have.
  """
  num_rows, length = batch["token_ids"].shape
  row_shape = RowShape(length, **row_shape)
  clip_shape = batch["frames"].shape[2:]
  sharded = empty_rows(row_shape, num_rows, clip_shape, (1, *clip_shape[1:]))
  tiles = batch.get("tiles", np.empty((num_rows, 0)))
  for number in range(num_rows):
    row = {name: batch[name][number] for name in PER_TOKEN}
    shard_row(row, batch["frames"][number], tiles[number], row_shape, sharded, number)
  return sharded
