"""The newest checkpoint of a training run, or any of them, opened like one in the released layout.

  WORKDIR/hub              config.json in the released layout, and the tokenizer
  WORKDIR/checkpoints/500  see `checkpoints.manager`

Weights are read when they are asked for, a layer at a time, and adapters are added to them on the
way; heads of an encoder's own training and the optimizer's state are left where they are.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from videochat_flash_jax.checkpoints.adapters import LORA_A, LORA_B, merged_kernel
from videochat_flash_jax.checkpoints.checkpoint import Checkpoint, with_head
from videochat_flash_jax.checkpoints.hf_config import parse_config, read_fields
from videochat_flash_jax.checkpoints.hf_mapping import RULES
from videochat_flash_jax.checkpoints.run_files import hub_files, is_whole, whole_steps
from videochat_flash_jax.checkpoints.weights import hub_arrays
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import LoraConfig

_WEIGHTS = ("trained.", "frozen.")  # how paths of weights begin in a saved state


def open_run(directory: Path) -> Checkpoint:
  """Opens the newest whole checkpoint of a run, or the one whose directory is given.

  Raises:
    InputError: there is none, or its files are damaged.
  """
  if is_whole(directory):
    step = directory
  elif steps := whole_steps(directory / "checkpoints"):
    step = directory / "checkpoints" / str(steps[-1])
  else:
    raise InputError(
      f"{directory}: this run has no whole checkpoint yet; wait for its first, or give another"
    )
  hub = hub_files(directory)
  fields = read_fields(hub)
  config = dataclasses.replace(parse_config(hub, fields), name=hub.parent.name)
  tensors = hub_arrays(_weights(step.absolute()))
  return Checkpoint(str(step), hub, with_head(config, tensors), fields, tensors)


def _weights(step: Path) -> dict[str, Any]:
  """The weights of the model by their paths, adapters merged."""
  try:
    run = ocp.JsonCheckpointHandler().restore(step / "run")
    arrays = {
      name.removeprefix(part): _SavedArray.open(step, name)
      for name in _names(step)
      for part in _WEIGHTS
      if name.startswith(part)
    }
  except (OSError, ValueError, KeyError) as error:
    raise _damaged(step, error) from error
  weights: dict[str, Any] = {}
  for _, path, _ in RULES:
    layer = path.removesuffix(".kernel")
    if layer + LORA_A in arrays:
      weights[path] = _Merged(
        *(arrays[end] for end in (path, layer + LORA_A, layer + LORA_B)),
        LoraConfig(**run["config"]["lora"]),
      )
    elif path in arrays:
      weights[path] = arrays[path]
  return weights


def _names(step) -> list[str]:
  """Names of all arrays of a saved state."""
  # Not through Orbax: where a file is missing, it leaves tensorstore to complain when all is over.
  keys = tensorstore.KvStore.open(_place(step)).result().list().result()
  names = (key.decode().rpartition("/") for key in keys)
  return [name for name, _, file in names if file == ".zarray"]


def _place(step, **inside):
  return {"driver": "ocdbt", "base": f"file://{step}/state/", **inside}


@dataclasses.dataclass(frozen=True)
class _SavedArray:
  """An array of a saved state; `array[2]` reads the third of a stack, `np.asarray` all of it."""

  step: Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @classmethod
  def open(cls, step: Path, name: str) -> "_SavedArray":
    stored = _stored(step, name)
    return cls(step, name, tuple(stored.shape), stored.dtype.numpy_dtype)

  def __getitem__(self, layer: int) -> np.ndarray:
    return self._read(layer)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self._read(...)

  def _read(self, index):
    try:
      return _stored(self.step, self.name)[index].read().result()
    except (OSError, ValueError, KeyError) as error:
      raise _damaged(self.step, error) from error


@functools.lru_cache(maxsize=256)
def _stored(step, name):
  place = _place(step, path=f"{name}/")
  return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()


@dataclasses.dataclass(frozen=True)
class _Merged:
  """A kernel with its adapter added, used as `_SavedArray` is."""

  kernel: _SavedArray
  a: _SavedArray
  b: _SavedArray
  lora: LoraConfig

  @property
  def shape(self) -> tuple[int, ...]:
    return self.kernel.shape

  @property
  def dtype(self) -> np.dtype:
    return np.promote_types(self.kernel.dtype, self.a.dtype)

  def __getitem__(self, layer: int) -> np.ndarray:
    return merged_kernel(self.kernel[layer], self.a[layer], self.b[layer], self.lora)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return merged_kernel(*map(np.asarray, (self.kernel, self.a, self.b)), self.lora)


def _damaged(step, error):
  reason = str(error).strip().split("\n")[0][:200]
  return InputError(
    f"{step}: a damaged checkpoint ({reason}); give the directory of an earlier one"
  )
