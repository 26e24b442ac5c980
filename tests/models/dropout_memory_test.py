"""What dropping tokens costs in memory: no copy of the stacked weights, forwards or backwards."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.conftest import quick_jit
from tests.models.lettered_rows import config_of, plan_of
from tests.models.small_models import DECODER
from videochat_flash_jax.models.qwen2 import Qwen2

ROW = "S v v v v v v v v ? a a ? a"
WIDE = dataclasses.replace(
  DECODER, width=256, depth=6, num_heads=8, num_kv_heads=2, head_size=32, mlp_width=1024
)


def temporary_bytes(function, *arguments):
  compiled = quick_jit(function).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def wide():
  """A decoder whose weights dwarf all else, its weights' bytes, and one layer's; nothing is run."""
  graph, weights = nnx.split(nnx.eval_shape(lambda: Qwen2(WIDE, rngs=nnx.Rngs(0))))
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
  return graph, weights, num_bytes / WIDE.depth


@pytest.mark.slow
def test_layers_are_never_copied_to_cut_the_stack(wide):
  graph, weights, layer_bytes = wide
  x = jax.ShapeDtypeStruct((1, 14, WIDE.width), jnp.float32)
  plan = plan_of(config_of("attention", (1, 3)), ROW)

  def read(weights, x, plan):
    return nnx.merge(graph, weights).prefill(x, jnp.array([14]), 16, plan)

  def write(weights, caches):
    decoder, x = nnx.merge(graph, weights), jnp.zeros((1, 1, WIDE.width))
    step = lambda _, state: decoder.extend(*state, jnp.array([1]))  # noqa: E731
    return jax.lax.fori_loop(0, 2, step, (x, caches))

  whole, parts = (temporary_bytes(read, weights, x, dropped) for dropped in (None, plan))
  assert parts < whole + 0.5 * layer_bytes
  caches = [jax.eval_shape(read, weights, x, dropped)[1] for dropped in (None, plan)]
  whole, parts = (temporary_bytes(write, weights, some) for some in caches)
  assert parts < whole + 0.5 * layer_bytes


@pytest.mark.slow
def test_gradients_of_parts_take_the_memory_of_the_whole(wide):
  graph, weights, layer_bytes = wide
  x = jax.ShapeDtypeStruct((1, 14, WIDE.width), jnp.float32)
  plan = plan_of(config_of("uniform", (1, 3), (1.0, 1.0, 1.0)), ROW)

  def whole(weights, x):
    return nnx.merge(graph, weights)(x, segment_ids=jnp.ones((1, 14), jnp.int32)).sum()

  def parts(weights, x):
    return nnx.merge(graph, weights).read_and_drop(x, plan)[0].sum()

  whole, parts = (temporary_bytes(jax.grad(function), weights, x) for function in (whole, parts))
  assert parts < whole + 2 * layer_bytes
