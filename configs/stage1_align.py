"""Stage 1, alignment: the connector alone learns, from images and clips of 4 frames.

vcflash train --config configs/stage1_align.py --workdir DIR
  --config.init_from="LANGUAGE_MODEL + ENCODER" --config.data.mixture=MIXTURE
vcflash compile --config configs/stage1_align.py --topology v5e:4x4

Mesh and slice: fsdp 16 on v5e:4x4, a row of 8,192 tokens a chip; the smallest slice is v5e:2x2,
with --config.rows=4. Expected on v5e:4x4, by the TPU's compiler: 5.8 of 15.75 GiB a chip, and at
least 2.2 s a step at the chip's published peak, an estimate (docs/memory.md).
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.num_steps = 2030  # 1.04 million images and short videos, 512 a step
  config.optimizer.learning_rate = 1e-3
  config.optimizer.scales = (("connector", 1.0), ("", 0.0))
  config.data.frames = (4, 4)
  config.data.sampling = "middle"
  config.data.template = "plain"
  config.tokens_per_row = 8192
  # Pictures alone may fill a row. The published data, 558,000 images and 481,000 clips, fill it to
  # 99 % with 34 examples that have some 99 tiles and 15 clips, if images have 336 pixels along
  # their shorter sides (an estimate): 5 tiles, or 7 where they are long.
  config.clips_per_shard = 24
  config.tiles_per_shard = 104
  config.mesh.sequence = 1
  config.sequence_parallel = "none"
  return config
