"""Adds LoRA adapters to the kernels that they belong to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from videochat_flash_jax.models.config import LoraConfig

# The paths of an adapter are the path of its layer with these endings; the kernel's has `.kernel`.
LORA_A, LORA_B = ".lora_a", ".lora_b"


def merge_adapters(weights: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
  """Returns weights without adapters that compute the same outputs.

  Args:
    weights: weights of a model with adapters, by their dotted paths: arrays, or objects that can be
      read like arrays.
    lora: the settings of the adapters.

  Returns:
    All weights except the adapters. Each kernel that has an adapter becomes a `MergedKernel`.
  """
  merged = {path: w for path, w in weights.items() if not path.endswith((LORA_A, LORA_B))}
  for path, a in weights.items():
    if path.endswith(LORA_A):
      layer = path.removesuffix(LORA_A)
      kernel = f"{layer}.kernel"
      merged[kernel] = MergedKernel(weights[kernel], a, weights[layer + LORA_B], lora)
  return merged


@dataclasses.dataclass(frozen=True)
class MergedKernel:
  """A kernel plus its adapter: kernel + A B * alpha / rank.

  It is computed in float32 when it is read: one layer with `kernel[2]`, or all of it with
  `np.asarray(kernel)`.

  Attributes:
    kernel: [in, out], or stacked layers [L, in, out].
    a: [in, rank] or [L, in, rank].
    b: [rank, out] or [L, rank, out].
    lora: the settings of the adapter.
  """

  kernel: Any
  a: Any
  b: Any
  lora: LoraConfig

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel."""
    return self.kernel.shape

  @property
  def dtype(self) -> np.dtype:
    """The wider dtype of kernel and adapter.

    A kernel that was frozen in bfloat16 would lose small changes that were trained in float32.
    """
    return np.promote_types(self.kernel.dtype, self.a.dtype)

  def __getitem__(self, layer: int) -> np.ndarray:
    return self._merged(self.kernel[layer], self.a[layer], self.b[layer])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self._merged(self.kernel, self.a, self.b)

  def _merged(self, *arrays):
    kernel, a, b = (np.asarray(array).astype(np.float32) for array in arrays)
    return (kernel + a @ b * np.float32(self.lora.alpha / self.lora.rank)).astype(self.dtype)
