import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import normal
from videochat_flash_jax.models.layer_stack import LayerStack

DEPTH, WIDTH = 3, 4


@pytest.fixture
def stack():
  return LayerStack(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), DEPTH, rngs=nnx.Rngs(0))


def apply(layer, index, carry):
  x, seen = carry
  return jnp.sin(layer(x) + index), seen.at[index].add(1)


def run(layers, x):
  return layers.run(apply, (x, jnp.zeros(DEPTH)))


def test_every_layer_runs_once_and_in_order(stack):
  x = normal(2, WIDTH)
  out, seen = run(stack, x)
  np.testing.assert_array_equal(seen, np.ones(DEPTH))
  for index in range(DEPTH):
    kernel, bias = stack.stacked.kernel[...][index], stack.stacked.bias[...][index]
    x = np.sin(x @ kernel + bias + index)
  assert_close(out, x, absolute=1e-6)


def test_layers_start_with_weights_of_their_own(stack):
  kernels = np.asarray(stack.stacked.kernel[...])
  assert len(np.unique(kernels)) == kernels.size


def test_apart_layers_compute_the_same_and_so_do_their_gradients(stack):
  x = normal(2, WIDTH)

  def out_and_gradient(layers):
    return jax.value_and_grad(lambda x: run(layers, x)[0].sum())(x)

  stacked = out_and_gradient(stack)
  apart = out_and_gradient(stack.unstack())
  assert_close(apart[0], stacked[0], relative=1e-6)
  assert_close(apart[1], stacked[1], relative=1e-6)


def test_taking_layers_apart_frees_the_stack(stack):
  kernel = stack.stacked.kernel[...]
  stack.unstack()
  assert kernel.is_deleted()
