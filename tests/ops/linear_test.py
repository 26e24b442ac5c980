"""Linear layers: products in the dtype of the input, gradients in that of the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from tests.conftest import assert_close
from videochat_flash_jax.ops.linear import Linear, float32_product, plus, product, times
from videochat_flash_jax.ops.norms import LayerNorm, RMSNorm

BF16 = jnp.bfloat16


def random(*shape, dtype=jnp.float32, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("use_bias", [False, True])
def test_values_and_gradients_are_those_of_flax(use_bias):
  ours = Linear(5, 3, use_bias=use_bias, rngs=nnx.Rngs(0))
  theirs = nnx.Linear(5, 3, use_bias=use_bias, rngs=nnx.Rngs(0))
  x = random(2, 4, 5)

  def of(layer):
    return nnx.value_and_grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=(0, 1))(layer, x)

  jax.tree.map(
    lambda a, b: assert_close(a, b, relative=1e-6),
    jax.tree.leaves(of(ours)),
    jax.tree.leaves(of(theirs)),
  )


def test_a_product_has_the_dtype_of_its_input_and_a_gradient_that_of_its_weight():
  x, weight = random(6, 40, 5, dtype=BF16), random(5, 3, seed=1)

  def gradient(weight):
    out, vjp = jax.vjp(product, x, weight)
    assert out.dtype == BF16
    return vjp(jnp.ones_like(out))

  d_x, precise = gradient(weight)
  assert (d_x.dtype, precise.dtype) == (BF16, jnp.float32)
  exact = np.asarray(x, np.float64).reshape(-1, 5).T @ np.ones((240, 3))
  assert_close(precise, exact, relative=1e-6)
  _, rounded = gradient(weight.astype(BF16))
  assert rounded.dtype == BF16
  assert_close(rounded, exact, relative=4e-3)
  assert np.abs(np.asarray(rounded, np.float64) - exact).max() > 1e-4


@pytest.mark.parametrize("rows", [32, 40])
def test_one_vector_times_a_large_matrix_is_summed_in_parts(monkeypatch, rows):
  monkeypatch.setattr("videochat_flash_jax.ops.linear._LARGE", 1)
  x, weight = random(1, 1, rows), random(rows, 7, seed=1)
  value, gradients = jax.value_and_grad(lambda *of: jnp.sin(product(*of)).sum(), (0, 1))(x, weight)
  exact = jax.value_and_grad(lambda x, w: jnp.sin(x @ w).sum(), (0, 1))(x, weight)
  jax.tree.map(lambda a, b: assert_close(a, b, relative=1e-6), (value, gradients), exact)
  program = str(jax.make_jaxpr(product)(x, weight))
  assert ("reduce_sum" in program) == (rows % 16 == 0)


def test_gradients_that_nobody_needs_are_not_computed():
  def dots(argnums):
    program = jax.make_jaxpr(jax.grad(lambda x, w: product(x, w).sum(), argnums))
    return str(program(jnp.ones((2, 5)), jnp.ones((5, 3)))).count("dot_general")

  assert (dots(0), dots(1), dots((0, 1))) == (2, 2, 3)


@pytest.mark.parametrize(
  "function",
  [
    plus,
    times,
    lambda x, b: layer(Linear(2, 2, param_dtype=BF16, rngs=nnx.Rngs(0)), "bias", b)(x),
    lambda x, s: layer(RMSNorm(2, 1e-6, param_dtype=BF16), "scale", s)(x),
    lambda x, b: layer(LayerNorm(2, 1e-6, param_dtype=BF16), "bias", b)(x),
  ],
  ids=["plus", "times", "a bias", "a scale", "another bias"],
)
def test_the_gradients_of_vectors_are_summed_in_float32(function):
  """Each of 4,096 tokens adds 1; a sum of bfloat16 ones stays at 256."""
  x, weight = jnp.ones((4096, 2), BF16), jnp.ones(2, BF16)
  gradient = jax.grad(lambda weight: function(x, weight).astype(jnp.float32).sum())
  np.testing.assert_array_equal(gradient(weight).astype(jnp.float32), [4096, 4096])
  lines = str(jax.make_jaxpr(gradient)(weight)).splitlines()
  sums = [line for line in lines if "= reduce_sum" in line and "[2] =" in line]
  assert sums and all("f32[2] =" in line for line in sums)


def layer(module, name, weight):
  getattr(module, name)[...] = weight
  return module


def int8_weight(*shape, dtype=jnp.float32):
  weight = qwix.quantize(random(*shape, seed=1), jnp.int8, channelwise_axes=(1,))
  return weight.astype(dtype)  # of the scales


@pytest.mark.parametrize(
  "dtype, relative", [(jnp.float32, 1e-6), (BF16, 0.01), (jnp.float16, 2e-3)]
)
def test_int8_weights_are_multiplied_in_the_dtype_of_the_input(dtype, relative):
  x, weight = random(2, 3, 40, dtype=dtype), int8_weight(40, 5, dtype=dtype)
  expected = np.asarray(x, np.float64) @ np.asarray(qwix.dequantize(weight), np.float64)
  layer = Linear(40, 5, rngs=nnx.Rngs(0))
  layer.kernel = nnx.Param(weight)
  for out, wanted in ((product(x, weight), dtype), (layer(x), dtype),
                      (float32_product(x, weight), jnp.float32)):  # fmt: skip
    assert out.dtype == wanted
    assert_close(out, expected, relative=relative)


def test_sums_of_int8_values_do_not_overflow_float16():
  weight = qwix.QArray(jnp.full((1000, 1), 127, jnp.int8), jnp.full((1, 1), 0.01, jnp.float16))
  np.testing.assert_allclose(product(jnp.ones((1, 1000), jnp.float16), weight), 1270, rtol=2e-3)
