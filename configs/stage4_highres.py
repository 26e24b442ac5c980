"""Stage 4, high resolution: encoder and connector adapt to 448 pixels, the decoder is frozen.

vcflash train --config configs/stage4_highres.py --workdir DIR
  --config.init_from=WORKDIR_OF_STAGE_3 --config.data.mixture=MIXTURE
vcflash compile --config configs/stage4_highres.py --topology v5e:2x2 --config.rows=1

Mesh and slice: each row over 4 chips; one on v5e:2x2, the smallest slice (docs/memory.md), while
the 16 rows of this config are for v5e:8x8. The 2B fits v5e:1x1 with --config.rows=1
--config.mesh.sequence=1 --config.clips_per_shard=512 --config.tiles_per_shard=160.
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.image_size = 448
  config.num_steps = 4642  # as published: a quarter of stage 3's examples, and some more
  config.optimizer.scales = (("vision", 0.2), ("connector", 1.0), ("", 0.0))
  return config
