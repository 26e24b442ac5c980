"""The small model that ships with the package, from nothing.

  vcflash train --config configs/tiny.py --workdir DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the config of the run."""
  config = ConfigDict()
  config.seed = 0
  config.vocab_size = 768
  config.stages = ("encoder", "short", "long")

  # The encoder alone learns to see: which thing, in which colour, covers a patch.
  config.encoder = ConfigDict({
    "objective": "patches",
    "trained": ("vision", "heads"),
    "num_steps": 2000,
    "peak_rate": 0.01,
    "videos": 8,
    "clips_per_video": 4,
    "log_every": 100,
  })

  # Then it is frozen, and the decoder learns to answer: about a few clips,
  questions = {"attribute": 0.7, "absence": 0.2, "order": 0.1}
  config.short = ConfigDict({
    "objective": "answers",
    "trained": ("connector", "decoder"),
    "num_steps": 800,
    "peak_rate": 0.005,
    "frames": (4, 16),
    "rows": 8,
    "tokens_per_row": 256,
    "clips_per_row": 4,
    "questions": questions,
    "log_every": 50,
  })

  # and about up to 32 of them.
  config.long = ConfigDict({
    "objective": "answers",
    "trained": ("connector", "decoder"),
    "num_steps": 400,
    "peak_rate": 0.003,
    "frames": (8, 128),
    "rows": 2,
    "tokens_per_row": 768,
    "clips_per_row": 32,
    "questions": questions,
    "log_every": 50,
  })
  return config
