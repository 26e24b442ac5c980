"""Whether a checkpoint holds the arrays that a run asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videochat_flash_jax.errors import InputError


def check_arrays(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]):
  """Refuses a checkpoint that holds other arrays than are asked for, or of other shapes.

  Args:
    where: the checkpoint, for messages.
    saved: what it holds, by dotted paths; anything with a `shape`.
    wanted: the same of this run.

  Raises:
    InputError: names the first array that differs.
  """
  for path in {**wanted, **saved}:
    held, asked = (
      f"{list(arrays[path].shape)}" if path in arrays else "none" for arrays in (saved, wanted)
    )
    if held != asked:
      raise InputError(
        f"{where}: a checkpoint of another config: of {path} it holds {held}, and this config "
        f"asks for {asked}; give the config that it was trained with, or another --workdir"
      )
