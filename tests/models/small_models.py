"""Small models in which every weight counts, biases and norm scales too."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.checkpoints.convert import flat_weights
from videochat_flash_jax.models.config import (
  ConnectorConfig,
  DecoderConfig,
  VideoChatFlashConfig,
  VisionConfig,
)

VISION = VisionConfig(
  kind="umt",
  image_size=32,
  patch_size=8,
  width=16,
  depth=2,
  num_heads=2,
  mlp_width=24,
  position_grid=4,
)
DECODER = DecoderConfig(
  vocab_size=40, width=24, depth=3, num_heads=6, num_kv_heads=2, head_size=8, mlp_width=20
)
CONFIG = VideoChatFlashConfig("small", VISION, ConnectorConfig(6, 2), DECODER)


def fill_randomly(make: Callable[[], nnx.Module], *, seed: int = 0) -> nnx.Module:
  """The model that `make` builds, with random weights of a size that keeps activations near 1."""
  rng = np.random.default_rng(seed)
  graph, state = nnx.split(nnx.eval_shape(make))

  def draw(path, shape):
    noise = rng.standard_normal(shape)
    if path.endswith("scale"):
      return 1 + 0.2 * noise
    return noise / shape[-2] ** 0.5 if path.endswith(("kernel", "embedding")) else 0.2 * noise

  filled = [
    (path, leaf.replace(jnp.asarray(draw(name, leaf.shape), leaf.dtype)))
    for (path, leaf), (name, _) in zip(nnx.to_flat_state(state), flat_weights(state), strict=True)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jnp.ndarray:
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)
