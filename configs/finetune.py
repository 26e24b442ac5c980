"""Your own videos: adapters of low rank in the 2B's decoder, and its connector.

Copy this file, and leave the copy beside common.py.

vcflash train --config configs/finetune.py --config.data.mixture=MIXTURE --workdir DIR
vcflash compile --config configs/finetune.py --topology v5e:2x2

Mesh and slice: a row of 32,768 tokens over the 4 chips of v5e:2x2; --config.mesh.sequence=1
--config.clips_per_shard=512 --config.tiles_per_shard=160 is for one device. Expected on v5e:2x2, by
the TPU's compiler: 3.8 of 15.75 GiB a chip, and at least 1.7 s a step at the chip's published peak,
an estimate (docs/memory.md). Rates and steps are a beginning, not published.
"""

import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the run."""
  config = common.get_config()
  config.model = "qwen2_5_2b_res448"
  config.init_from = "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448"
  config.image_size = 224  # pixels; 448, as it was released, takes four times the patches
  config.num_steps = 1000
  config.rows = 1
  config.optimizer.learning_rate = 1e-4
  config.optimizer.scales = (("lora_", 1.0), ("connector", 0.1), ("", 0.0))
  config.lora.rank = 16
  return config
