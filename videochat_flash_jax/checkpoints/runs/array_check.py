"""Checks that a checkpoint holds the arrays that a run needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videochat_flash_jax.errors import InputError


def check_arrays(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]):
  """Compares the names and shapes of the arrays in a checkpoint with those that a run needs.

  Args:
    where: the checkpoint, for error messages.
    saved: the arrays in the checkpoint by their dotted paths, or any objects with a `shape`.
    wanted: the arrays of this run, in the same form.

  Raises:
    InputError: they differ. The message names the first array that differs.
  """
  for path in {**wanted, **saved}:
    held, asked = (
      f"{list(arrays[path].shape)}" if path in arrays else "none" for arrays in (saved, wanted)
    )
    if held != asked:
      raise InputError(
        f"{where}: a checkpoint of another config: it holds {held} for {path}, but this config "
        f"needs {asked}; give the config that it was trained with, or another --workdir"
      )
