"""Rotary positions (Su et al. 2021), in float32: at position 100,000 bfloat16 has no fraction."""

import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int


def rope_table(
  positions: Int[Array, "B T"], head_size: int, theta: float
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
  """Cosines and sines for each position; the H/2 frequencies are stored twice, as Qwen2 does."""
  exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
  frequencies = 1.0 / theta**exponents
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
  x: Float[Array, "B T N H"], cosines: Float[Array, "#B T H"], sines: Float[Array, "#B T H"]
) -> Float[Array, "B T N H"]:
  """Rotates channel i with channel i + H/2 by the angle of the token's position."""
  x32 = x.astype(jnp.float32)
  first, second = jnp.split(x32, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x32 * cosines[:, :, None] + turned * sines[:, :, None]).astype(x.dtype)
