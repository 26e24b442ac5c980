"""What all runs share: every field of a config, at its default.

`vcflash train --help-config` lists all fields with their meaning; they are defined in
`videochat_flash_jax/train/settings.py`.

A step computes `rows` rows of `tokens_per_row` tokens, into which examples are packed one behind
another. The published batches count examples: 512 a step in stage 1, 256 later. `rows` was chosen
to hold about as many, by these estimates of an example's tokens, nothing that was measured:

  stage 1   240 tokens   16 rows of  8,192 hold 540   (4 frames are 64 tokens; images have tiles)
  stage 2   450 tokens    4 rows of 32,768 hold 290
  stage 3 2,100 tokens   16 rows of 32,768 hold 250   (64 to 512 frames are 1,024 to 8,192 tokens)
  stage 4 2,100 tokens   16 rows of 32,768 hold 250

A run logs how many examples its steps hold. `num_steps` is one epoch of the published data by the
published batch. A row's tokens are spread over `mesh.sequence` chips; each part of a row has room
for `clips_per_shard` clips of 4 frames and for `tiles_per_shard` tiles of images, 64 tokens each.
Mesh and rows are sized for the slice in a config's header; docs/memory.md has others.
"""

from ml_collections import ConfigDict

from videochat_flash_jax.train.config import default_config


def get_config() -> ConfigDict:
  """Returns what every stage begins with, locked: a mistyped field is an error."""
  return default_config()
