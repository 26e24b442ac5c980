"""Stage 1, alignment: the connector alone learns, from images and clips of 4 frames.

vcflash train --config configs/stage1_align.py --workdir DIR
  --config.init_from="LANGUAGE_MODEL + ENCODER" --config.data.mixture=MIXTURE
vcflash compile --config configs/stage1_align.py --topology v5e:4x4

Mesh and slice: fsdp 16 on v5e:4x4, a row of 8,192 tokens a chip; the smallest slice is v5e:2x2,
with --config.rows=4 (docs/memory.md).
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
  config.clips_per_shard = 64  # as many tokens of text as of pictures
  config.mesh.sequence = 1
  config.sequence_parallel = "none"
  return config
