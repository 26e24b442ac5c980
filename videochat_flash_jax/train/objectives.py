"""What a run trains its model to do, by the name that `config.objective` gives.

Every published stage trains on answers. Only stage 0 of the tiny model trains on patches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.train import batches, flops, patch_classification
from videochat_flash_jax.train.batches import RunBatches
from videochat_flash_jax.train.losses import Sums, answer_loss
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainProgram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """All that depends on the objective of a run.

  Attributes:
    loss: `loss(model, batch, layout=...)`; see `losses`.
    batch_shapes: `batch_shapes(settings, layout)` gives the shape and sharding of each field of a
      batch of all processes.
    check: `check(settings, program)` raises an `InputError` if a run cannot use these settings.
    run_batches: the batches of a run; see `batches.run_batches`.
    held_out_batches: the batches of its evaluations; see `batches.held_out_batches`.
    step_flops: `step_flops(settings, sequence_shards)`; see `flops.step_flops`.
    add_heads: `add_heads(model, rngs)` puts the weights that only the loss needs into
      `model.heads`. They begin at random. None: there are no such weights.
    reads_mixtures: whether a run reads `data.mixture`, unless it has `data.synthetic`, and
      `eval.mixture`.
    batch_fields: config fields that decide what a batch holds, so that a run can only resume with
      the same values; in addition to those that bind every run.
  """

  loss: Callable[..., Sums]
  batch_shapes: Callable[[TrainSettings, Layout], dict[str, Any]]
  check: Callable[[TrainSettings, TrainProgram], None]
  run_batches: Callable[..., RunBatches]
  held_out_batches: Callable[..., RunBatches | None]
  step_flops: Callable[[TrainSettings, int], float]
  add_heads: Callable[[VideoChatFlash, nnx.Rngs], None] | None = None
  reads_mixtures: bool
  batch_fields: tuple[str, ...] = ()


OBJECTIVES = {
  "answers": Objective(
    loss=answer_loss,
    batch_shapes=batches.batch_shapes,
    check=batches.check_features,
    run_batches=batches.run_batches,
    held_out_batches=batches.held_out_batches,
    step_flops=flops.step_flops,
    reads_mixtures=True,
  ),
  "patches": Objective(
    loss=patch_classification.patch_loss,
    batch_shapes=patch_classification.batch_shapes,
    check=patch_classification.check,
    run_batches=patch_classification.run_batches,
    held_out_batches=patch_classification.held_out_batches,
    step_flops=patch_classification.step_flops,
    add_heads=patch_classification.add_heads,
    reads_mixtures=False,
    batch_fields=("clips_per_shard",),
  ),
}
