"""What the four stages share, as published: one epoch of AdamW, rows packed full.

A step computes `rows` rows of `tokens_per_row` tokens. A row's tokens are spread over
`mesh.sequence` chips; each of its parts holds room for `clips_per_shard` clips of 4 frames and for
`tiles_per_shard` tiles of images, 64 tokens each. Mesh and rows are sized for the slice in a
config's header; docs/memory.md has others.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what every stage begins with."""
  config = ConfigDict()
  config.model = "qwen2_7b_res448"  # a constructor of VideoChatFlashConfig
  config.image_size = 224  # pixels; the encoder's weights fit any size
  config.trained = ("vision", "connector", "decoder")
  config.num_steps = 10_000
  config.learning_rate = 1e-5
  config.vision_learning_rate = 2e-6
  config.frames = (64, 512)  # of a video: the least and the most

  config.rows = 16
  config.tokens_per_row = 32_768
  config.clips_per_shard = 128
  config.tiles_per_shard = 40  # an image has up to 6 x 6 tiles and a base view

  mesh = config.mesh = ConfigDict()
  mesh.data = 1
  mesh.fsdp = -1  # what is left
  mesh.sequence = 4
  mesh.tensor = 1
  mesh.num_slices = 1
  # A row of 8,192 tokens fits one chip: "none", with mesh.sequence = 1, and nothing of it travels.
  # Longer ones are split: "ring" holds no whole row, whatever the length; or "all_gather". See
  # docs/sharding.md.
  config.sequence_parallel = "ring"
  config.zigzag = True
  return config
