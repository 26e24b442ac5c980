"""Stage 4, high resolution: encoder and connector adapt to 448 pixels, the decoder is frozen.

vcflash train --config configs/stage4_highres.py --workdir DIR
  --config.init_from=WORKDIR_OF_STAGE_3 --config.data.mixture=MIXTURE
vcflash compile --config configs/stage4_highres.py --topology v5e:2x2 --config.rows=1

Mesh and slice: each row over 4 chips, 16 of them on v5e:8x8; one on v5e:2x2, the smallest slice,
with --config.rows=1. Expected there, by the TPU's compiler: 11.5 of 15.75 GiB a chip, and at least
14.3 s a step at the chip's published peak, an estimate (docs/memory.md).
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
