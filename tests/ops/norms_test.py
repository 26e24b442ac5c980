import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops.norms import LayerNorm, RMSNorm

WIDTH = 32


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def norm_with_weights(kind, eps, param_dtype=jnp.float32):
  norm = kind(WIDTH, eps, param_dtype=param_dtype)
  norm.scale[...] = random(WIDTH, seed=1).astype(param_dtype)
  if kind is LayerNorm:
    norm.bias[...] = random(WIDTH, seed=2).astype(param_dtype)
  return norm


def exactly(norm, x):
  """The norm in float64."""
  x = np.asarray(x, np.float64)
  if isinstance(norm, RMSNorm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * np.asarray(norm.scale[...])
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
  return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_norms_are_exact_where_the_epsilon_counts(kind, eps, size):
  norm, x = norm_with_weights(kind, eps), size * random(3, 5, WIDTH)
  assert_close(norm(x), exactly(norm, x), relative=2e-6)


def test_a_large_mean_does_not_drown_the_variance():
  norm, x = norm_with_weights(LayerNorm, 1e-6), 1000 + random(4, WIDTH)
  assert_close(norm(x), exactly(norm, x), relative=1e-4)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_constant_and_zero_rows_are_finite(kind):
  norm = norm_with_weights(kind, 1e-6)
  x = jnp.stack([jnp.zeros(WIDTH), jnp.full(WIDTH, 3.0)])
  assert_close(norm(x), exactly(norm, x), relative=1e-6)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_statistics_of_bfloat16_are_float32(kind):
  norm = norm_with_weights(kind, 1e-6, jnp.bfloat16)
  x = random(4, WIDTH).astype(jnp.bfloat16)
  out = norm(x)
  assert out.dtype == jnp.bfloat16
  assert_close(out, exactly(norm, x), relative=1e-2)
