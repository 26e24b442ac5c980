"""Reads tensors from PyTorch files (`.pt`, `.pth`, `.bin`).

These files are pickles. Only tensors are loaded from them, and no code in them is run. The extra
`convert` must be installed: torch is imported only here, and only when such a file is read.
"""

import functools
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from videochat_flash_jax.checkpoints.hub.safetensors_files import FLOATING, StoredTensor
from videochat_flash_jax.errors import InputError

_SUFFIXES = (".pt", ".pth", ".bin")
_BLOCK_VALUES = 2**23


def is_torch_file(path: Path) -> bool:
  """Returns whether a file is a PyTorch file, judged by its suffix."""
  return path.suffix in _SUFFIXES


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a state dict by their names.

  If the file is in torch's newer format, the tensors are not read until they are used.

  Raises:
    InputError: torch is not installed, the file holds more than tensors, or it is not a PyTorch
      file.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f"{path}: a PyTorch file; to read it: pip install 'videochat_flash_jax[convert]'"
    ) from error
  try:
    found = _load(torch, path)
  except pickle.UnpicklingError as error:
    raise InputError(
      f"{path}: holds more than tensors, or is damaged; it was not unpickled: download it again"
    ) from error
  except (RuntimeError, EOFError, ValueError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{path}: not a complete PyTorch file ({reason}); download it again"
    ) from error
  if not isinstance(found, dict) or not all(
    isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
  ):
    raise InputError(
      f"{path}: not a plain dict of tensors by name; save only model.state_dict() in it"
    )
  return {name: _stored(torch, tensor) for name, tensor in found.items()}


def _load(torch, path):
  load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
  try:
    return load(mmap=True)
  except RuntimeError:  # torch's older format cannot be memory-mapped
    return load()


def _stored(torch, tensor):
  codes = {getattr(torch, str(dtype)): code for code, dtype in FLOATING.items()}
  code = codes.get(tensor.dtype, str(tensor.dtype))
  return StoredTensor(tuple(tensor.shape), code, functools.partial(_blocks, torch, tensor, code))


def _blocks(torch, tensor, code) -> Iterator[np.ndarray]:
  rows_per_block = max(1, _BLOCK_VALUES // max(1, tensor.numel() // max(1, len(tensor))))
  for rows in tensor.detach().split(rows_per_block):
    if code == "BF16":  # torch cannot convert bfloat16 to numpy, so its bits are passed as int16
      yield rows.contiguous().view(torch.int16).numpy().view(FLOATING[code])
    else:
      yield rows.numpy()
