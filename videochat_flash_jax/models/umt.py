"""UMT-L, a video ViT: every patch of a clip attends to all patches, in space and time.

Source: `PretrainVisionTransformer` of OpenGVLab/VideoChat-Flash (Unmasked Teacher, Li et al. 2023).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.models.config import VisionConfig
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.ops.attention import attention, scaled
from videochat_flash_jax.ops.linear import Linear, plus
from videochat_flash_jax.ops.norms import LayerNorm
from videochat_flash_jax.shapes import Array, Float

BLOCK_NORM_EPS = 1e-6
FINAL_NORM_EPS = 1e-12


class UMT(nnx.Module):
  """Maps the pixels of clips to one feature per patch."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.config = config
    patch_values = 3 * config.patch_size**2
    self.patch_embed = Linear(patch_values, config.width, param_dtype=param_dtype, rngs=rngs)
    self.blocks = LayerStack(
      lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.depth, rngs=rngs
    )
    self.norm = LayerNorm(config.width, FINAL_NORM_EPS, param_dtype=param_dtype)

  def __call__(self, pixels: Float[Array, "C F height width 3"]) -> Float[Array, "C P E"]:
    """Encodes clips. A clip of one frame is an image.

    Args:
      pixels: normalised pixels.

    Returns:
      Features of P = F * grid * grid patches, in the order frame, row, column.
    """
    x = self.patch_embed(patches(pixels, self.config.patch_size))
    num_frames, grid = pixels.shape[1], pixels.shape[2] // self.config.patch_size
    table = position_table(self.config, num_frames=num_frames, grid=grid)
    x = x + jnp.asarray(table, x.dtype)
    (x,) = self.blocks.run(lambda block, _, carry: (block(carry[0]),), (x,))
    return self.norm(x)


class Block(nnx.Module):
  """Pre-norm attention and MLP. Queries and values have a bias; keys have none."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype):
    width = config.width
    self.num_heads = config.num_heads
    self.norm1 = LayerNorm(width, BLOCK_NORM_EPS, param_dtype=param_dtype)
    self.qkv = Linear(width, 3 * width, use_bias=False, param_dtype=param_dtype, rngs=rngs)
    self.q_bias = nnx.Param(jnp.zeros((width,), param_dtype))
    self.v_bias = nnx.Param(jnp.zeros((width,), param_dtype))
    self.proj = Linear(width, width, param_dtype=param_dtype, rngs=rngs)
    self.norm2 = LayerNorm(width, BLOCK_NORM_EPS, param_dtype=param_dtype)
    self.fc1 = Linear(width, config.mlp_width, param_dtype=param_dtype, rngs=rngs)
    self.fc2 = Linear(config.mlp_width, width, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "C P E"]) -> Float[Array, "C P E"]:
    """Applies the block."""
    x = x + self._attend(self.norm1(x))
    return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))

  def _attend(self, x):
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    q, v = plus(q, self.q_bias[...]), plus(v, self.v_bias[...])
    heads = (*x.shape[:-1], self.num_heads, -1)
    out = attention(scaled(q.reshape(heads)), k.reshape(heads), v.reshape(heads))
    return self.proj(out.reshape(x.shape))


def patches(pixels, size):
  """Cuts pixels [C, F, height, width, 3] into patches [C, F * grid * grid, size * size * 3]."""
  clips, frames, height, width, channels = pixels.shape
  x = pixels.reshape(clips, frames, height // size, size, width // size, size, channels)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(clips, -1, size * size * channels)


def position_table(config: VisionConfig, *, num_frames: int, grid: int) -> np.ndarray:
  """The fixed position embeddings [num_frames * grid * grid, E], float32.

  They are sinusoids of the flat index over `position_frames` x `position_grid`^2 patches. For
  other sizes the table is resampled: bicubically in space, then linearly in time, as torch does
  with align_corners=False. An image has the embeddings of the first frame.
  """
  frames = 1 if num_frames == 1 else config.position_frames
  table = _sinusoid(frames * config.position_grid**2, config.width)
  table = table.reshape(frames, config.position_grid, config.position_grid, config.width)
  if grid != config.position_grid:
    space = cubic_weights(config.position_grid, grid)
    table = np.einsum("hi,wj,fijd->fhwd", space, space, table, optimize=True)
  if num_frames != frames:
    table = np.einsum("gf,fhwd->ghwd", linear_weights(frames, num_frames), table)
  return table.reshape(-1, config.width).astype(np.float32)


def _sinusoid(length, width):
  """A table [length, width]: sines in even channels j, cosines in odd ones.

  The angle is index / 10000^(2 floor(j / 2) / width).
  """
  channel = np.arange(width)
  angles = np.arange(length)[:, None] / 10000.0 ** (2 * (channel // 2) / width)
  return np.where(channel % 2 == 0, np.sin(angles), np.cos(angles))


def linear_weights(size, new_size):
  """The matrix [new_size, size] of linear resampling. Border cells are repeated outwards."""
  weights = np.zeros((new_size, size))
  for i, centre in enumerate(_source_coordinates(size, new_size)):
    centre = max(centre, 0.0)
    left = int(centre)
    weights[i, min(left, size - 1)] += 1 - (centre - left)
    weights[i, min(left + 1, size - 1)] += centre - left
  return weights


def cubic_weights(size, new_size, a=-0.75):
  """The matrix [new_size, size] of bicubic resampling along one axis (Keys 1981).

  Border cells are repeated outwards. `a` is that of torch.
  """
  weights = np.zeros((new_size, size))
  for i, centre in enumerate(_source_coordinates(size, new_size)):
    left = int(np.floor(centre))
    for tap in range(left - 1, left + 3):
      t = abs(centre - tap)
      near = (a + 2) * t**3 - (a + 3) * t**2 + 1
      far = a * (t**3 - 5 * t**2 + 8 * t - 4)
      weights[i, min(max(tap, 0), size - 1)] += near if t <= 1 else far
  return weights


def _source_coordinates(size, new_size):
  """The centres of the new cells, as coordinates between the old cells."""
  return (np.arange(new_size) + 0.5) * size / new_size - 0.5
