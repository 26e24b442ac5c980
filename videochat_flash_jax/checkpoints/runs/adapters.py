"""Adapters of LoRA, added to the kernels that they stand beside."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from videochat_flash_jax.models.config import LoraConfig

# Ends of the paths of an adapter; before them comes the path of its layer, as before `.kernel`.
LORA_A, LORA_B = ".lora_a", ".lora_b"


def merge_adapters(weights: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
  """Weights without adapters that compute the same.

  Args:
    weights: of a model with adapters, by their dotted paths: arrays, or what is read like them.
    lora: of these adapters.

  Returns:
    All weights but the adapters; a kernel with an adapter as `MergedKernel`.
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
  """kernel + A B * alpha / rank, computed in float32 when it is read: `kernel[2]`, or all of it.

  Attributes:
    kernel: [in, out], or a stack of them [L, in, out].
    a: [in, rank] or [L, in, rank].
    b: [rank, out] or [L, rank, out].
    lora: of the adapter.
  """

  kernel: Any
  a: Any
  b: Any
  lora: LoraConfig

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the kernel."""
    return self.kernel.shape

  @property
  def dtype(self) -> np.dtype:
    """The wider one: a kernel frozen in bfloat16 has no room for what float32 has learnt."""
    return np.promote_types(self.kernel.dtype, self.a.dtype)

  def __getitem__(self, layer: int) -> np.ndarray:
    return self._merged(self.kernel[layer], self.a[layer], self.b[layer])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self._merged(self.kernel, self.a, self.b)

  def _merged(self, *arrays):
    kernel, a, b = (np.asarray(array).astype(np.float32) for array in arrays)
    return (kernel + a @ b * np.float32(self.lora.alpha / self.lora.rank)).astype(self.dtype)
