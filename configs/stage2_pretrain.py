"""Stage 2, pre-training on images and short videos of up to 8 frames: all parts learn.

vcflash train --config configs/stage2_pretrain.py --workdir DIR
  --config.init_from=WORKDIR_OF_STAGE_1 --config.data.mixture=MIXTURE
vcflash compile --config configs/stage2_pretrain.py --topology v5e:8x8

Mesh and slice: fsdp 4 x sequence 16 on v5e:8x8; the smallest slice is v5e:4x4, a row at a time,
with --config.rows=1. Expected on v5e:8x8, by the TPU's compiler: 8.7 of 15.75 GiB a chip, and at
least 1.3 s a step at the chip's published peak, an estimate (docs/memory.md).
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.num_steps = 23_400  # 6 million images and short videos, 256 a step
  config.data.frames = (4, 8)
  config.rows = 4
  config.mesh.sequence = 16
  config.clips_per_shard = 32
  config.tiles_per_shard = 24
  return config
