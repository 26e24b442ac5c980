"""Adapters of LoRA, added to the kernels that they stand beside."""

import numpy as np

from videochat_flash_jax.models.config import LoraConfig

# Ends of the paths of an adapter; before them comes the path of its layer, as before `.kernel`.
LORA_A, LORA_B = ".lora_a", ".lora_b"


def merged_kernel(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoraConfig) -> np.ndarray:
  """One layer's kernel + A B * alpha / rank, summed in float32.

  Args:
    kernel: [in, out].
    a: [in, rank].
    b: [rank, out].
    lora: of the adapter.

  Returns:
    [in, out] in the wider dtype of the kernel and its adapter: a kernel that was frozen in
    bfloat16 has no room for what an adapter in float32 has learnt.
  """
  dtype = np.promote_types(kernel.dtype, a.dtype)
  added = a.astype(np.float32) @ b.astype(np.float32) * np.float32(lora.alpha / lora.rank)
  return (kernel.astype(np.float32) + added).astype(dtype)
