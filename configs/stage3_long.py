"""Stage 3, instructions about short and long videos, of 64 to 512 frames: all parts learn.

vcflash train --config configs/stage3_long.py --workdir DIR
  --config.init_from=WORKDIR_OF_STAGE_2 --config.data.mixture=MIXTURE
vcflash compile --config configs/stage3_long.py --topology v5e:8x8

Mesh and slice: fsdp 16 x sequence 4 on v5e:8x8, v6e:8x8 or v5p:4x4x4; the smallest slice is
v5e:4x4, a row at a time, with --config.rows=1 --config.mesh.sequence=16
--config.clips_per_shard=32 --config.tiles_per_shard=24; the 2B fits v5e:2x2 with --config.rows=1.
Expected, by the TPU's compiler: 10.6 of 15.75 GiB a chip of v5e, 9.2 on v6e and v5p, and at least
5.5 s a step on v5e, 2.4 on v5p, 1.3 on v6e, an estimate from their published peaks
(docs/memory.md). A million tokens, some 65,500 frames and their text:

vcflash compile --config configs/stage3_long.py --topology v5p:4x4x4 --config.rows=1
  --config.mesh.fsdp=1 --config.mesh.sequence=64 --config.tokens_per_row=1048576
  --config.clips_per_shard=258 --config.tiles_per_shard=0
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.num_steps = 13_700  # 3.5 million examples, as the paper counts them, 256 a step
  return config
