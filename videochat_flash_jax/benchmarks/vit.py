"""`vcflash bench vit`: the video encoder, from pixels to features, beside the same in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.benchmarks.comparison import Phase, compare, installed, random_weights
from videochat_flash_jax.benchmarks.floors import FLOAT_BYTES, Work
from videochat_flash_jax.benchmarks.umt_peer import UMTPeer
from videochat_flash_jax.models.config import VideoChatFlashConfig, VisionConfig
from videochat_flash_jax.models.umt import UMT

UMT_L = VideoChatFlashConfig.qwen2_7b_res224().vision


def run(repeats: int = 3, *, clips: int = 2, config: VisionConfig = UMT_L) -> dict[str, Any]:
  """Encodes random clips [clips, clip_frames, S, S, 3] with random weights."""
  graph, weights = random_weights(lambda: UMT(config, rngs=nnx.Rngs(0)))
  size = config.image_size
  rng = np.random.default_rng(0)
  frames = rng.standard_normal((clips, config.clip_frames, size, size, 3), np.float32)
  pixels = jnp.asarray(frames)
  encode = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))
  num_weights = sum(leaf.size for leaf in jax.tree.leaves(weights))
  least = work(config, clips, num_weights)
  peer = None
  if installed("torch"):
    peer = UMTPeer(config, nnx.to_pure_dict(weights), frames)
  phases = {"encode": Phase(lambda: encode(weights, pixels), least, peer and peer.encode)}
  shapes = {
    "clips": clips, "frames": config.clip_frames, "image_size": size, "depth": config.depth,
    "width": config.width, "num_heads": config.num_heads, "mlp_width": config.mlp_width,
  }  # fmt: skip
  return compare("vit", phases, shapes=shapes, repeats=repeats, peer=peer and peer.name)


def work(config: VisionConfig, clips: int, num_weights: int) -> Work:
  """The least work: the matrix products of all patches, and attention within each clip.

  Args:
    config: sizes of the encoder.
    clips: number of clips.
    num_weights: number of values in all weights.
  """
  patches = config.num_patches(config.clip_frames)
  patch_values = 3 * config.patch_size**2
  products = config.depth * config.width * (4 * config.width + 2 * config.mlp_width)
  products += patch_values * config.width
  attention = config.depth * 2 * patches * config.width  # scores and mixing, for one patch
  flops = 2 * clips * patches * (products + attention)
  values = num_weights + clips * patches * (patch_values + config.width)
  return Work(flops, values * FLOAT_BYTES)
