"""Normalisation layers; their statistics are float32 for weights of any dtype.

In bfloat16 the squares of large activations would lose the digits for which epsilon is small.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.ops.linear import times
from videochat_flash_jax.shapes import Array, Float


class RMSNorm(nnx.Module):
  """Scales the last axis to a root mean square of one, then multiplies by a learned vector."""

  def __init__(self, width: int, eps: float, *, param_dtype=jnp.float32):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,), param_dtype))

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return times(x32.astype(x.dtype), self.scale[...])


class LayerNorm(nnx.Module):
  """Shifts and scales the last axis to mean 0 and variance 1, then by learned vectors."""

  def __init__(self, width: int, eps: float, *, param_dtype=jnp.float32):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    x32 = centred * jax.lax.rsqrt(variance + self.eps)
    x32 = x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return x32.astype(x.dtype)
