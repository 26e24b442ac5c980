"""The peer of our video encoder: UMT in torch, as VideoChat-Flash has it; needs the extra `bench`.

Its attention is a product, a softmax and a product over all patches of a clip.
"""

from typing import Any

import jax
import numpy as np

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.models.config import VisionConfig
from videochat_flash_jax.models.umt import BLOCK_NORM_EPS, FINAL_NORM_EPS, position_table


class UMTPeer:
  """Encodes pixels [clips, frames, size, size, 3] with the weights of our `UMT`."""

  def __init__(self, config: VisionConfig, weights: dict[str, Any], pixels: np.ndarray):
    import torch

    torch.set_num_threads(usable_cores())
    self.name = f"UMT in torch {torch.__version__}"
    self._torch, self._config = torch, config
    weights = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), weights)
    self._patch, self._norm = weights["patch_embed"], weights["norm"]
    self._blocks = [
      jax.tree.map(
        lambda stack, layer=layer: _rows_of_outputs(stack[layer]), weights["blocks"]["stacked"]
      )
      for layer in range(config.depth)
    ]
    # torch wants channels and frames first.
    self._pixels = torch.from_numpy(pixels.transpose(0, 4, 1, 2, 3).copy())
    size = config.patch_size
    kernel = self._patch["kernel"].T.reshape(-1, 1, size, size, 3)
    self._kernel = kernel.permute(0, 4, 1, 2, 3).contiguous()
    grid = pixels.shape[2] // size
    self._table = torch.from_numpy(position_table(config, num_frames=pixels.shape[1], grid=grid))

  def encode(self):
    """Returns the features [clips, patches, width]."""
    functional, size = self._torch.nn.functional, self._config.patch_size
    with self._torch.inference_mode():
      x = functional.conv3d(self._pixels, self._kernel, self._patch["bias"], (1, size, size))
      x = x.flatten(2).mT + self._table
      for block in self._blocks:
        x = x + self._attend(block, self._normalised(x, block["norm1"], BLOCK_NORM_EPS))
        hidden = self._normalised(x, block["norm2"], BLOCK_NORM_EPS)
        hidden = functional.gelu(self._linear(hidden, block["fc1"]))
        x = x + self._linear(hidden, block["fc2"])
      return self._normalised(x, self._norm, FINAL_NORM_EPS)

  def _attend(self, block, x):
    bias = [block["q_bias"], self._torch.zeros_like(block["q_bias"]), block["v_bias"]]
    qkv = self._linear(x, {**block["qkv"], "bias": self._torch.cat(bias)})
    q, k, v = qkv.unflatten(-1, (3, self._config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    return self._linear((weights @ v).transpose(1, 2).flatten(2), block["proj"])

  def _linear(self, x, layer):
    return self._torch.nn.functional.linear(x, layer["kernel"], layer["bias"])

  def _normalised(self, x, layer, eps):
    norm = self._torch.nn.functional.layer_norm
    return norm(x, x.shape[-1:], layer["scale"], layer["bias"], eps)


def _rows_of_outputs(weight):
  """A matrix [in, out] as torch keeps it: [out, in], contiguous. Vectors stay as they are."""
  return weight.T.contiguous() if weight.ndim == 2 else weight
