"""Checkpoints of a run, through Orbax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


def save_checkpoint(directory: Path, step: int, weights: Any):
  """Saves nested dicts of arrays as checkpoint `step` of a run; it appears whole or not at all.

  Args:
    directory: of all checkpoints of the run; the newest two are kept.
    step: a number larger than that of any earlier checkpoint.
    weights: what to save.
  """
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    manager.save(step, args=ocp.args.StandardSave(weights))
