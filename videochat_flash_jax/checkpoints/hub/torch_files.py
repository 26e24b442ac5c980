"""Files of torch (`.pt`, `.bin`): pickles, of which only tensors are taken and nothing is run.

They need the extra `convert`; torch is imported here alone, and only when such a file is given.
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
  """Whether the name of a file is that of a pickle of torch."""
  return path.suffix in _SUFFIXES


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
  """The tensors of a state dict, by their names; of a file in torch's newer format, unread.

  Raises:
    InputError: torch is not installed, the file holds more than tensors, or is no file of torch.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f"{path}: a file of torch; to read it: pip install 'videochat_flash_jax[convert]'"
    ) from error
  try:
    found = _load(torch, path)
  except pickle.UnpicklingError as error:
    raise InputError(
      f"{path}: holds more than tensors, or is damaged; it is not unpickled: fetch it again"
    ) from error
  except (RuntimeError, EOFError, ValueError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    raise InputError(f"{path}: no whole file of torch ({reason}); fetch it again") from error
  if not isinstance(found, dict) or not all(
    isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
  ):
    raise InputError(f"{path}: no plain dict of tensors by name; save model.state_dict() alone")
  return {name: _stored(torch, tensor) for name, tensor in found.items()}


def _load(torch, path):
  load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
  try:
    return load(mmap=True)
  except RuntimeError:  # torch's older format cannot be mapped
    return load()


def _stored(torch, tensor):
  codes = {getattr(torch, str(dtype)): code for code, dtype in FLOATING.items()}
  code = codes.get(tensor.dtype, str(tensor.dtype))
  return StoredTensor(tuple(tensor.shape), code, functools.partial(_blocks, torch, tensor, code))


def _blocks(torch, tensor, code) -> Iterator[np.ndarray]:
  rows_per_block = max(1, _BLOCK_VALUES // max(1, tensor.numel() // max(1, len(tensor))))
  for rows in tensor.detach().split(rows_per_block):
    if code == "BF16":  # numpy knows bfloat16 by its bits only
      yield rows.contiguous().view(torch.int16).numpy().view(FLOATING[code])
    else:
      yield rows.numpy()
