import functools
import itertools

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


def run_in_parts(layers, x, edges):
  carry = (x, jnp.zeros(DEPTH))
  for edge in itertools.pairwise(edges):
    carry, layers = layers.run_part(apply, carry, range(*edge))
  return carry


@pytest.mark.parametrize("edges", [(0, 3), (0, 1, 3), (0, 1, 2, 3)])
def test_parts_one_after_another_are_the_whole_and_so_are_their_gradients(stack, edges):
  x = normal(2, WIDTH)

  def out_and_gradients(layers, run):
    graph, weights = nnx.split(layers)

    def total(weights, x):
      out, seen = run(nnx.merge(graph, weights), x)
      return out.sum(), seen

    (out, seen), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(weights, x)
    np.testing.assert_array_equal(seen, np.ones(DEPTH))
    return out, gradients

  in_parts = functools.partial(run_in_parts, edges=edges)
  whole, of_whole = out_and_gradients(stack, run)
  parts, of_parts = out_and_gradients(stack, in_parts)
  assert_close(parts, whole, relative=1e-6)
  jax.tree.map(lambda a, b: assert_close(a, b, relative=1e-6), of_parts, of_whole)


def test_one_layer_can_be_had_by_itself(stack):
  x = normal(2, WIDTH)
  assert_close(stack.layer(1)(x), x @ stack.stacked.kernel[...][1], absolute=1e-6)


@pytest.mark.parametrize("in_part", [False, True], ids=["run", "run_part"])
def test_what_is_computed_again_is_as_asked_and_gradients_are_the_same(stack, in_part):
  x = normal(2, WIDTH)
  graph, weights = nnx.split(stack)

  def loss(weights, remat, frozen=frozenset()):
    layers = nnx.merge(graph, weights)
    layers.remat, layers.frozen = remat, frozen
    carry = (x, jnp.zeros(DEPTH))
    if in_part:
      return layers.run_part(apply, carry, range(DEPTH))[0][0].sum()
    return layers.run(apply, carry)[0].sum()

  def products(remat):  # in the backward loop: two for the gradients, and those made again
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=remat)))(weights))
    return text.count("dot_general[")

  expected = jax.grad(functools.partial(loss, remat="full"))(weights)
  for remat in ("dots", "none"):
    found = jax.grad(functools.partial(loss, remat=remat))(weights)
    jax.tree.map(functools.partial(assert_close, relative=1e-6), found, expected)
  assert products("full") == products("dots") + 1 == products("none") + 1


def test_frozen_weights_of_a_part_get_no_gradient_and_the_others_theirs(stack):
  x = normal(2, WIDTH)
  graph, weights = nnx.split(stack)

  def loss(weights, frozen):
    layers = nnx.merge(graph, weights)
    layers.frozen = frozenset(frozen)
    return layers.run_part(apply, (x, jnp.zeros(DEPTH)), range(DEPTH))[0][0].sum()

  whole, part = (nnx.to_pure_dict(jax.grad(loss)(weights, f)) for f in ((), ("kernel",)))
  assert_close(part["stacked"]["bias"], whole["stacked"]["bias"], relative=1e-6)
  assert not part["stacked"]["kernel"].any() and whole["stacked"]["kernel"].all()
