"""InternVideo2-1B, the other video ViT. It learns its position embeddings and layer scales.

Source: `PretrainVisionTransformer_clean` of OpenGVLab/VideoChat-Flash (InternVideo2, Wang et al.
2024). A class token comes before the patches. It has row 0 of every table of positions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VisionConfig
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.models.umt import cubic_weights, linear_weights, patches
from videochat_flash_jax.ops.attention import attention, scaled
from videochat_flash_jax.ops.linear import Linear, plus, times
from videochat_flash_jax.ops.norms import RMSNorm
from videochat_flash_jax.shapes import Array, Float

_NORM_EPS = 1e-6
_INITIAL_LAYER_SCALE = 1e-5
_INITIAL_CLASS_TOKEN_STD = 0.02


class InternVideo2(nnx.Module):
  """Maps the pixels of clips to one feature per patch. There is no norm at the end."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.config = config
    width, grid = config.width, config.grid_size
    patch_values = 3 * config.patch_size**2
    self.patch_embed = Linear(patch_values, width, param_dtype=param_dtype, rngs=rngs)
    noise = jax.random.normal(rngs.params(), (1, width), param_dtype)
    self.class_token = nnx.Param(_INITIAL_CLASS_TOKEN_STD * noise)
    video = sincos_positions(width, num_frames=config.clip_frames, grid=grid)
    image = sincos_positions(width, num_frames=1, grid=grid)
    self.video_positions = nnx.Param(jnp.asarray(video, param_dtype))
    self.image_positions = nnx.Param(jnp.asarray(image, param_dtype))
    self.blocks = LayerStack(
      lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.depth, rngs=rngs
    )

  def __call__(self, pixels: Float[Array, "C F height width 3"]) -> Float[Array, "C P E"]:
    """Encodes clips of `clip_frames` frames. A clip of one frame is an image.

    Args:
      pixels: normalised pixels, of the config's `image_size`.

    Returns:
      Features of P = F * grid * grid patches, in the order frame, row, column. The class token is
      left out.
    """
    x = self.patch_embed(patches(pixels, self.config.patch_size))
    class_tokens = plus(jnp.zeros_like(x[:, :1]), self.class_token[...])
    x = jnp.concatenate([class_tokens, x], axis=1)
    is_image = pixels.shape[1] == 1
    x = plus(x, (self.image_positions if is_image else self.video_positions)[...])
    (x,) = self.blocks.run(lambda block, _, carry: (block(carry[0]),), (x,))
    return x[:, 1:]


class Block(nnx.Module):
  """Pre-norm attention and MLP. The output of each is scaled per channel before it is added."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype):
    width = config.width
    self.num_heads = config.num_heads
    self.norm1 = RMSNorm(width, _NORM_EPS, param_dtype=param_dtype)
    self.qkv = Linear(width, 3 * width, use_bias=False, param_dtype=param_dtype, rngs=rngs)
    self.q_norm = RMSNorm(width, _NORM_EPS, param_dtype=param_dtype)
    self.k_norm = RMSNorm(width, _NORM_EPS, param_dtype=param_dtype)
    self.proj = Linear(width, width, param_dtype=param_dtype, rngs=rngs)
    self.attention_scale = nnx.Param(jnp.full((width,), _INITIAL_LAYER_SCALE, param_dtype))
    self.norm2 = RMSNorm(width, _NORM_EPS, param_dtype=param_dtype)
    self.fc1 = Linear(width, config.mlp_width, param_dtype=param_dtype, rngs=rngs)
    self.fc2 = Linear(config.mlp_width, width, param_dtype=param_dtype, rngs=rngs)
    self.mlp_scale = nnx.Param(jnp.full((width,), _INITIAL_LAYER_SCALE, param_dtype))

  def __call__(self, x: Float[Array, "C P E"]) -> Float[Array, "C P E"]:
    """Applies the block."""
    x = x + times(self._attend(self.norm1(x)), self.attention_scale[...])
    hidden = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
    return x + times(self.fc2(hidden), self.mlp_scale[...])

  def _attend(self, x):
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    q, k = self.q_norm(q), self.k_norm(k)  # over the full width, before it is split into heads
    heads = (*x.shape[:-1], self.num_heads, -1)
    out = attention(scaled(q.reshape(heads)), k.reshape(heads), v.reshape(heads))
    return self.proj(out.reshape(x.shape))


def sincos_positions(width: int, *, num_frames: int, grid: int) -> np.ndarray:
  """Initial position embeddings [1 + num_frames * grid * grid, width], float32.

  Row 0, of the class token, is zero. The first quarter of the channels encodes the frame of a
  patch, the next three eighths its column, and the last three eighths its row. (The original calls
  the column's channels "h" and the row's "w".) An image has the table of one frame.

  Raises:
    InputError: `width` is no multiple of 16, so it cannot be split like this.
  """
  if width % 16:
    raise InputError(
      f"field 'vision.width' is {width}; give a multiple of 16, as InternVideo2's positions need"
    )
  frame, row, column = np.indices((num_frames, grid, grid)).reshape(3, -1)
  channels = [
    _sincos(frame, width // 4), _sincos(column, 3 * width // 8), _sincos(row, 3 * width // 8),
  ]  # fmt: skip
  table = np.concatenate(channels, axis=1)
  return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def _sincos(index, width):
  """A table [len(index), width]: all sines, then all cosines.

  Channel i of either half has the frequency 10000^(-i / (width / 2)).
  """
  frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
  angles = index[:, None] * frequencies
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def resample_positions(
  table: np.ndarray, *, table_frames: int, num_frames: int, grid: int
) -> np.ndarray:
  """Resamples learned position embeddings to another number of frames and patches.

  As in the original, linearly in time and bicubically in space. Row 0, of the class token, stays as
  it is. To read a checkpoint of 8 frames with clips of 4 frames, the table [1 + 8 * 16 * 16, E]
  becomes [1 + 4 * 16 * 16, E].

  Args:
    table: stored embeddings [1 + table_frames * patches, E], where patches is a square number.
    table_frames: number of frames in `table`; 1 for the table of images.
    num_frames: number of frames in the result.
    grid: patches along one side of a frame in the result.

  Returns:
    Embeddings [1 + num_frames * grid * grid, E] in the dtype of `table`.
  """
  class_row, cells = table[:1], _by_frame(table, table_frames)
  old_grid = math.isqrt(cells.shape[1])
  cells = cells.reshape(table_frames, old_grid, old_grid, -1)
  time, space = linear_weights(table_frames, num_frames), cubic_weights(old_grid, grid)
  cells = np.einsum("gf,hi,wj,fije->ghwe", time, space, space, cells, optimize=True)
  return np.concatenate([class_row, _rows(cells, table)])


def joint_image_positions(table: np.ndarray, *, table_frames: int) -> np.ndarray:
  """The position embeddings of images, for a checkpoint with one table for videos and images.

  An image patch has the mean of the embeddings over the frames: [1 + 4 * 16 * 16, E] becomes
  [1 + 16 * 16, E]. Row 0, of the class token, stays as it is.
  """
  mean = _by_frame(table, table_frames).mean(axis=0)
  return np.concatenate([table[:1], _rows(mean, table)])


def _by_frame(table, table_frames):
  """Embeddings without the class token's row, [table_frames, patches, E], float64."""
  return np.asarray(table[1:], np.float64).reshape(table_frames, -1, table.shape[1])


def _rows(embeddings, table):
  """Embeddings [..., E] as a matrix of rows, in the dtype of `table`."""
  return embeddings.reshape(-1, table.shape[1]).astype(table.dtype)
