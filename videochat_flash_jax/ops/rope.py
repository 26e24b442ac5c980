"""Rotary positions (Su et al. 2021).

Angles are float32: bfloat16 has no fractions at 100,000. At position 1,000,000 an angle has the
error of its frequency a million times, so frequencies are computed on the host, in float64.
"""

import math

import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.shapes import Array, Float, Int

# YaRN: channels that turn at least 32 times within the original context keep their frequency;
# channels that turn at most once are slowed by the whole factor; channels in between, by a part.
_KEPT_TURNS, _SLOWED_TURNS = 32, 1


def rope_table(
  positions: Int[Array, "B T"],
  head_size: int,
  theta: float,
  *,
  stretch: float = 1.0,
  original_positions: int = 0,
  scores_grow: bool = True,
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
  """Returns cosines and sines for each position; the H/2 frequencies stand twice, as in Qwen2.

  Args:
    positions: rotary positions of the tokens.
    head_size: H.
    theta: the slowest channel turns once in about 2 pi theta positions.
    stretch: above 1, the context is made longer by this factor, as YaRN does (Peng et al. 2023).
      Fast channels, which tell neighbours apart, keep their frequency, and slow channels turn more
      slowly. Attention scores grow by the square of 0.1 ln(stretch) + 1.
    original_positions: length of the context that the model was trained with.
    scores_grow: False for tables that turn keys further which were turned before.
  """
  frequencies = _frequencies(head_size, theta, stretch, original_positions)
  angles = positions.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)
  angles = jnp.concatenate([angles, angles], axis=-1)
  scale = 0.1 * math.log(stretch) + 1 if scores_grow else 1.0
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _frequencies(head_size, theta, stretch, original_positions):
  """Radians by which each of the H/2 channels turns from one position to the next, float64."""
  frequencies = float(theta) ** -(np.arange(0, head_size, 2) / head_size)
  if stretch > 1:
    slowed = _slowed_share(head_size, theta, original_positions)
    frequencies = frequencies * (1 - slowed) + frequencies / stretch * slowed
  return frequencies


def _slowed_share(head_size, theta, original_positions):
  """Part of the stretch for each of the H/2 channels: 0 for fast channels, 1 for slow ones."""

  def channel(turns):
    """The channel that turns this often within the original context; it may lie between two."""
    wave_length = original_positions / turns
    return head_size * math.log(wave_length / (2 * math.pi)) / (2 * math.log(theta))

  first = max(math.floor(channel(_KEPT_TURNS)), 0)
  last = min(math.ceil(channel(_SLOWED_TURNS)), head_size - 1)
  return np.clip((np.arange(head_size // 2) - first) / max(last - first, 0.001), 0, 1)


def apply_rope(
  x: Float[Array, "B T N H"],
  cosines: Float[Array, "#B #T H"],
  sines: Float[Array, "#B #T H"],
  scale: float = 1.0,
) -> Float[Array, "B T N H"]:
  """Rotates each pair of channels i and i + H/2 by the angle of the token's position.

  Queries are scaled for attention here as well, before they are rounded to the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)  # by a quarter turn
  turned = x32 * cosines[:, :, None] + rotated * sines[:, :, None]
  return (turned * scale).astype(x.dtype)
