"""Stage 1, alignment: the connector alone learns, from images and clips of 4 frames.

vcflash compile --config configs/stage1_align.py --topology v5e:4x4

Mesh and slice: fsdp 16 on v5e:4x4, a row of 8,192 tokens a chip; the smallest slice is v5e:2x2,
with --config.rows=4 (docs/memory.md).
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.trained = ("connector",)
  config.learning_rate = 1e-3
  config.frames = (4, 4)
  config.tokens_per_row = 8192
  config.clips_per_shard = 64  # as many tokens of text as of pictures
  config.mesh.sequence = 1
  config.sequence_parallel = "none"
  return config
