"""The small model that ships with the package, from nothing.

vcflash train --config configs/tiny.py --workdir DIR

About 13 minutes on 2 CPU cores (1,320 CPU seconds). Expected at the end of the stages: encoder,
kinds 0.97 and colours 0.997 of patches, after merging; short, answer_tokens 0.987; long, 0.983. On
videos of 8 to 64 frames 98 % of attribute questions are answered right (198 of 202, seed 90210) and
95 % of absence questions (76 of 80).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the run."""
  config = ConfigDict()
  config.seed = 0
  config.vocab_size = 768
  config.stages = ("encoder", "short", "long")

  # The encoder alone learns to see: which thing, in which colour, covers a patch.
  encoder = config.encoder = ConfigDict()
  encoder.objective = "patches"
  encoder.trained = ("vision", "heads")
  encoder.num_steps = 3000
  encoder.peak_rate = 0.01
  encoder.videos = 8
  encoder.clips_per_video = 4
  encoder.log_every = 100

  # Then it is frozen, and the decoder learns to answer: about a few clips,
  short = config.short = ConfigDict()
  short.objective = "answers"
  short.trained = ("connector", "decoder")
  short.num_steps = 900
  short.peak_rate = 0.005
  short.questions = {"attribute": 0.8, "absence": 0.2}
  short.frames = (4, 16)
  short.rows = 8
  short.tokens_per_row = 256
  short.clips_per_row = 4
  short.log_every = 50

  # and about up to 32 of them.
  long = config.long = ConfigDict(short.to_dict())
  long.num_steps = 500
  long.peak_rate = 0.003
  long.frames = (8, 128)
  long.rows = 2
  long.tokens_per_row = 1024
  long.clips_per_row = 32
  return config
