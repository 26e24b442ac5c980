"""Weights that a run never changes: written once, beside the checkpoints that are read with them.

  DIRECTORY/frozen/state   arrays by their dotted paths: `frozen.vision.patch_embed.kernel`
  DIRECTORY/frozen/run     {"id": "4be1..."}
  DIRECTORY/500/run        {"frozen": "4be1...", ...}: what 500/state is to be read with

The id is drawn when they are written, so a checkpoint that was carried beside those of another run
is not taken for a whole one.
"""

import logging
import uuid
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from videochat_flash_jax.checkpoints.runs.run_files import FROZEN
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.processes import is_peer_failure

_log = logging.getLogger("videochat_flash_jax")


def save_frozen(directory: Path, state: ocp.args.CheckpointArgs) -> str:
  """Writes them, whole or not at all, over what an unfinished beginning may have left.

  Every process calls it; it returns when they are on disk.

  Args:
    directory: of the checkpoints.
    state: the arrays.

  Returns:
    Their id. That of process 0 counts, which writes all of a checkpoint but the arrays.

  Raises:
    OSError, ValueError: they cannot be written.
  """
  _log.info("%s: frozen weights are written, once; training waits for it", directory / FROZEN)
  drawn = uuid.uuid4().hex
  args = ocp.args.Composite(state=state, run=ocp.args.JsonSave({"id": drawn}))
  with _checkpointer() as checkpointer:
    checkpointer.save(directory / FROZEN, args=args, force=True)
  return drawn


def find_frozen(checkpoint: Path, run: dict[str, Any]) -> Path | None:
  """The directory of what a checkpoint is to be read with; None if it holds all weights itself.

  Args:
    checkpoint: its directory.
    run: what its `run` holds.

  Raises:
    InputError: they are missing, damaged, or those of another run.
  """
  wanted, frozen = run.get(FROZEN), checkpoint.parent / FROZEN
  if wanted is None:
    return None
  if not frozen.is_dir():
    raise InputError(
      f"{checkpoint}: the frozen weights of its run are missing, which belong to it in {frozen}; "
      "copy that directory from the run's checkpoints, too"
    )
  try:
    found = ocp.JsonCheckpointHandler().restore(frozen / "run")["id"]
  except (OSError, ValueError, KeyError) as error:
    raise damaged_frozen(frozen, error) from error
  if found != wanted:
    raise InputError(
      f"{frozen}: these are the frozen weights of another run than {checkpoint}; copy those of its "
      "own run there"
    )
  return frozen


def frozen_shapes(frozen: Path) -> dict[str, Any]:
  """What is in the directory, by dotted paths: each has a `shape`."""
  try:
    return dict(ocp.StandardCheckpointHandler().metadata(frozen / "state"))
  except (OSError, ValueError, KeyError) as error:
    raise damaged_frozen(frozen, error) from error


def restore_frozen(frozen: Path, shapes: dict[str, Any]) -> dict[str, Any]:
  """Reads the arrays, each to its devices and in its dtype.

  Args:
    frozen: from `find_frozen`.
    shapes: `jax.ShapeDtypeStruct` with shardings, by dotted paths.

  Raises:
    InputError: the files are damaged.
  """
  args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
  try:
    with _checkpointer() as checkpointer:
      return checkpointer.restore(frozen, args=args)["state"]
  except (OSError, ValueError, KeyError) as error:
    if is_peer_failure(error):
      raise
    raise damaged_frozen(frozen, error) from error


def damaged_frozen(frozen: Path, error: Exception) -> InputError:
  """What to say where they cannot be read."""
  reason = str(error).strip().split("\n")[0][:200]
  return InputError(
    f"{frozen}: the frozen weights of this run are damaged ({reason}); all of its checkpoints need "
    "them: put a copy of them there, or begin again in another --workdir"
  )


def _checkpointer():
  items = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))
