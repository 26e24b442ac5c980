"""Writes the weights that a run never changes once, beside its checkpoints, and reads them.

  DIRECTORY/frozen/state   arrays by their dotted paths: `frozen.vision.patch_embed.kernel`
  DIRECTORY/frozen/run     {"id": "4be1..."}
  DIRECTORY/500/run        {"frozen": "4be1...", ...}: the frozen weights that belong to 500/state

The id is a random number that is drawn when the frozen weights are written. So a checkpoint is
never combined with the frozen weights of another run, even if somebody copied it there.
"""

import logging
import uuid
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from videochat_flash_jax.checkpoints.runs.run_files import FROZEN
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.processes import is_peer_failure
from videochat_flash_jax.plain_paths import plain_path

_log = logging.getLogger("videochat_flash_jax")


def save_frozen(directory: Path, state: ocp.args.CheckpointArgs) -> str:
  """Writes the frozen weights, and returns when they are on disk.

  All processes must call this function. The directory appears only when everything is written; what
  an interrupted earlier call left is replaced.

  Args:
    directory: directory of the checkpoints.
    state: the arrays.

  Returns:
    The id of the frozen weights. Each process draws one, and only that of process 0 is used: it
    writes everything in a checkpoint except the arrays.

  Raises:
    OSError, ValueError: they cannot be written.
  """
  _log.info("%s: frozen weights are written, once; training waits for it", directory / FROZEN)
  frozen_id = uuid.uuid4().hex
  args = ocp.args.Composite(state=state, run=ocp.args.JsonSave({"id": frozen_id}))
  with _checkpointer() as checkpointer:
    checkpointer.save(plain_path(directory) / FROZEN, args=args, force=True)
  return frozen_id


def find_frozen(checkpoint: Path, run: dict[str, Any]) -> Path | None:
  """Returns the directory of the frozen weights of a checkpoint; None if the run has none.

  Args:
    checkpoint: directory of the checkpoint.
    run: content of its `run`.

  Raises:
    InputError: the frozen weights are missing or damaged, or belong to another run.
  """
  wanted_id, frozen = run.get(FROZEN), checkpoint.parent / FROZEN
  if wanted_id is None:
    return None
  if not frozen.is_dir():
    raise InputError(
      f"{checkpoint}: the frozen weights of its run are missing in {frozen}; "
      "copy that directory from the run's checkpoints too"
    )
  try:
    found_id = ocp.JsonCheckpointHandler().restore(plain_path(frozen) / "run")["id"]
  except (OSError, ValueError, KeyError) as error:
    raise damaged_frozen(frozen, error) from error
  if found_id != wanted_id:
    raise InputError(
      f"{frozen}: these are the frozen weights of another run, not of {checkpoint}; replace them "
      "by those of its own run"
    )
  return frozen


def frozen_shapes(frozen: Path) -> dict[str, Any]:
  """Returns metadata of the frozen arrays by their dotted paths; each has a `shape`.

  Args:
    frozen: directory from `find_frozen`.

  Raises:
    InputError: the files are damaged.
  """
  try:
    return dict(ocp.StandardCheckpointHandler().metadata(plain_path(frozen) / "state"))
  except (OSError, ValueError, KeyError) as error:
    raise damaged_frozen(frozen, error) from error


def restore_frozen(frozen: Path, shapes: dict[str, Any]) -> dict[str, Any]:
  """Reads the frozen arrays to their devices, in the dtypes of `shapes`.

  Args:
    frozen: directory from `find_frozen`.
    shapes: a `jax.ShapeDtypeStruct` with sharding for each array, by dotted paths.

  Returns:
    The arrays by their dotted paths.

  Raises:
    InputError: the files are damaged.
  """
  args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
  try:
    with _checkpointer() as checkpointer:
      return checkpointer.restore(plain_path(frozen), args=args)["state"]
  except (OSError, ValueError, KeyError) as error:
    if is_peer_failure(error):
      raise
    raise damaged_frozen(frozen, error) from error


def damaged_frozen(frozen: Path, error: Exception) -> InputError:
  """Returns the error to raise if the frozen weights cannot be read."""
  reason = str(error).strip().split("\n")[0][:200]
  return InputError(
    f"{frozen}: the frozen weights of this run are damaged ({reason}); all of its checkpoints need "
    "them: put a copy of them there, or start again in another --workdir"
  )


def _checkpointer():
  items = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))
