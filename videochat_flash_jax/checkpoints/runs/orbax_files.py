"""Opens a checkpoint of a training run as if it had the released format.

  WORKDIR/hub                 config.json in the released format, and the tokenizer
  WORKDIR/checkpoints/500     a checkpoint; see `checkpoints.runs.manager`
  WORKDIR/checkpoints/frozen  the frozen weights of the run

Weights are read only when they are used, one layer at a time, and LoRA adapters are merged into
them at that moment. The state of the optimizer, and the heads that are only used to train an
encoder, are not read.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint, with_head
from videochat_flash_jax.checkpoints.hub.hf_config import parse_config, read_fields
from videochat_flash_jax.checkpoints.hub.hf_mapping import RULES
from videochat_flash_jax.checkpoints.hub.weights import hub_arrays
from videochat_flash_jax.checkpoints.runs.adapters import merge_adapters
from videochat_flash_jax.checkpoints.runs.frozen_weights import damaged_frozen, find_frozen
from videochat_flash_jax.checkpoints.runs.run_files import FROZEN, hub_files, is_whole, whole_steps
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import LoraConfig
from videochat_flash_jax.plain_paths import plain_path

_WEIGHTS = ("trained.", f"{FROZEN}.")  # in a saved state, paths of weights begin like this


def open_run(directory: Path) -> Checkpoint:
  """Opens the newest whole checkpoint of a run, or the checkpoint whose directory is given.

  Raises:
    InputError: the run has no whole checkpoint, or its files are damaged.
  """
  if is_whole(directory):
    step = directory
  elif steps := whole_steps(directory / "checkpoints"):
    step = directory / "checkpoints" / str(steps[-1])
  else:
    raise InputError(
      f"{directory}: this run has no whole checkpoint yet; wait for its first one, or give another "
      "run"
    )
  tensors = hub_arrays(_weights(step.absolute()))
  hub = hub_files(directory)
  fields = read_fields(hub)
  config = dataclasses.replace(parse_config(hub, fields), name=hub.parent.name)
  return Checkpoint(str(step), hub, with_head(config, tensors), fields, tensors)


def _weights(step: Path) -> dict[str, Any]:
  """The weights of the model by their paths, with merged adapters."""
  try:
    run = ocp.JsonCheckpointHandler().restore(plain_path(step) / "run")
    lora = LoraConfig(**run["config"]["lora"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _damaged(step, error) from error
  frozen = find_frozen(step, run)
  arrays = _arrays(step) | (_arrays(frozen) if frozen else {})
  weights = merge_adapters(arrays, lora)
  return {path: weights[path] for _, path, _ in RULES if path in weights}


def _arrays(checkpoint: Path) -> dict[str, "_SavedArray"]:
  """Weights in the `state` of a checkpoint or of frozen weights, by their paths in the model."""
  try:
    return {
      name.removeprefix(part): _SavedArray.open(checkpoint, name)
      for name in _names(checkpoint)
      for part in _WEIGHTS
      if name.startswith(part)
    }
  except (OSError, ValueError, KeyError) as error:
    raise _damaged(checkpoint, error) from error


def _names(checkpoint) -> list[str]:
  """Names of all arrays of a saved state."""
  # Orbax is not used here: if a file is missing, it reports that only when the program ends.
  keys = tensorstore.KvStore.open(_kvstore_spec(checkpoint)).result().list().result()
  names = (key.decode().rpartition("/") for key in keys)
  return [name for name, _, file in names if file == ".zarray"]


def _kvstore_spec(checkpoint, **fields):
  # The path stands by itself: in an address, `#`, `?` and `%20` would mean something else.
  base = {"driver": "file", "path": f"{plain_path(checkpoint)}/state/"}
  return {"driver": "ocdbt", "base": base, **fields}


@dataclasses.dataclass(frozen=True)
class _SavedArray:
  """An array of a saved state. `array[2]` reads one layer of a stack, `np.asarray` all of it."""

  checkpoint: Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @classmethod
  def open(cls, checkpoint: Path, name: str) -> "_SavedArray":
    """Opens an array by its name; only its shape and dtype are read."""
    stored = _stored(checkpoint, name)
    return cls(checkpoint, name, tuple(stored.shape), stored.dtype.numpy_dtype)

  def __getitem__(self, layer: int) -> np.ndarray:
    return self._read(layer)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self._read(...)

  def _read(self, index):
    try:
      return _stored(self.checkpoint, self.name)[index].read().result()
    except (OSError, ValueError, KeyError) as error:
      raise _damaged(self.checkpoint, error) from error


@functools.lru_cache(maxsize=256)
def _stored(checkpoint, name):
  kvstore = _kvstore_spec(checkpoint, path=f"{name}/")
  return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


def _damaged(checkpoint, error):
  if checkpoint.name == FROZEN:
    return damaged_frozen(checkpoint, error)
  reason = str(error).strip().split("\n")[0][:200]
  return InputError(
    f"{checkpoint}: a damaged checkpoint ({reason}); give the directory of an earlier one"
  )
