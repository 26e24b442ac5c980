"""Rows of a batch in letters, and plans of what they lose."""

import numpy as np

from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.models.token_dropout import DropoutPlan, plan_dropout

RATIOS = (1.0, 0.5, 0.25)


def config_of(kind, layers=(1, 2), ratios=RATIOS) -> DropoutConfig:
  return DropoutConfig(kind, layers, ratios)


CHOICE = config_of("uniform0_attention")


def marks(*rows):
  """Rows such as "S v v ? . A a": segments begin with capitals, `v` is visual, `.` is padding.

  Returns is_visual, segment_ids and learnt; `a` is learnt, `A` too.
  """
  rows = [row.split() for row in rows]
  width = max(map(len, rows))
  rows = np.array([row + ["."] * (width - len(row)) for row in rows])
  starts = np.char.isupper(rows)
  segment_ids = np.where(rows == ".", 0, np.cumsum(starts, axis=1)).astype(np.int32)
  return rows == "v", segment_ids, np.char.lower(rows) == "a"


def plan_of(config, *rows, training=False, **options) -> DropoutPlan:
  is_visual, segment_ids, learnt = marks(*rows)
  return plan_dropout(config, is_visual, segment_ids, learnt if training else None, **options)
