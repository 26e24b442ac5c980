"""Stage 4, high resolution: encoder and connector adapt to 448 pixels, the decoder is frozen.

vcflash compile --config configs/stage4_highres.py --topology v5e:2x2 --config.rows=1

Mesh and slice: each row over 4 chips; one row on v5e:2x2, the smallest slice, or 16 rows on v5e:8x8
(docs/memory.md).
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the stage."""
  config = common.get_config()
  config.image_size = 448
  config.trained = ("vision", "connector")
  return config
