"""Rotary positions (Su et al. 2021), in float32: at position 100,000 bfloat16 has no fraction."""

import math

import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int

# YaRN: a channel that turns this often within the original context keeps its frequency (first), or
# is slowed down by the whole factor (second); those in between, by a part of it.
_KEPT_TURNS, _SLOWED_TURNS = 32, 1


def rope_table(
  positions: Int[Array, "B T"],
  head_size: int,
  theta: float,
  *,
  stretch: float = 1.0,
  original_positions: int = 0,
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
  """Cosines and sines for each position; the H/2 frequencies are stored twice, as Qwen2 does.

  Args:
    positions: of the tokens.
    head_size: H.
    theta: the slowest channel turns once in about 2 pi theta positions.
    stretch: above 1, a context `original_positions` long is stretched by it as YaRN does (Peng et
      al. 2023): fast channels tell neighbours apart and stay, slow ones turn slower; and the
      scores of attention grow by the square of 0.1 ln(stretch) + 1.
    original_positions: the context that the model was trained with.
  """
  exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
  frequencies = 1.0 / theta**exponents
  if stretch > 1:
    slowed = _slowed_share(head_size, theta, original_positions)
    frequencies = frequencies * (1 - slowed) + frequencies / stretch * slowed
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  angles = jnp.concatenate([angles, angles], axis=-1)
  scale = 0.1 * math.log(stretch) + 1
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _slowed_share(head_size, theta, original_positions):
  """Part of the stretch that each of the H/2 channels takes: 0 if it is fast, 1 if slow."""

  def channel(turns):
    wave_length = original_positions / turns
    return head_size * math.log(wave_length / (2 * math.pi)) / (2 * math.log(theta))

  first = max(math.floor(channel(_KEPT_TURNS)), 0)
  last = min(math.ceil(channel(_SLOWED_TURNS)), head_size - 1)
  channels = jnp.arange(head_size // 2, dtype=jnp.float32)
  return jnp.clip((channels - first) / max(last - first, 0.001), 0, 1)


def apply_rope(
  x: Float[Array, "B T N H"], cosines: Float[Array, "#B T H"], sines: Float[Array, "#B T H"]
) -> Float[Array, "B T N H"]:
  """Rotates channel i with channel i + H/2 by the angle of the token's position."""
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x32 * cosines[:, :, None] + turned * sines[:, :, None]).astype(x.dtype)
