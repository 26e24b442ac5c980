"""A run of thirty very small steps, for `vcflash train --config` of this file.

The tiny model begins at random and reads rows of 96 tokens about one clip of the synthetic world.
"""

from pathlib import Path

from ml_collections import ConfigDict

from videochat_flash_jax.cli.config_file import load_config

COMMON = Path(__file__).parents[2] / "configs" / "common.py"


def get_config() -> ConfigDict:
  config = load_config(COMMON)
  config.model, config.image_size = "tiny", 32
  config.compute_dtype, config.remat = "float32", "none"
  config.init_from = "random"
  config.num_steps, config.log_every = 30, 1
  config.rows, config.tokens_per_row, config.clips_per_shard, config.tiles_per_shard = 1, 96, 1, 0
  config.mesh.sequence, config.sequence_parallel = 1, "none"
  config.optimizer.learning_rate, config.optimizer.warm_up = 1e-3, 0.0
  config.data.synthetic = ConfigDict({"attribute": 0.8, "absence": 0.2})
  config.data.frames, config.data.workers = (4, 4), 0
  config.eval.batches, config.checkpoint.every = 1, 2
  return config
