"""What dropping tokens costs in memory: no copy of the stacked weights, forwards or backwards."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import quick_jit
from tests.models.lettered_rows import config_of, plan_of
from tests.models.small_models import DECODER
from videochat_flash_jax.models.kv_cache import KVCache
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

  def read(edges, weights, x, caches):
    """Reads tokens with parts of the layers, one after another."""
    decoder, longer = nnx.merge(graph, weights), []
    for edge, cache in zip(itertools.pairwise(edges), caches, strict=True):
      x, cache = decoder.read(x, cache, jnp.array([x.shape[1]]), layers=range(*edge))
      longer.append(cache)
    return x, longer

  def write(edges, weights, caches):
    """Reads two tokens, one by one."""
    step = lambda _, state: read(edges, weights, *state)  # noqa: E731
    return jax.lax.fori_loop(0, 2, step, (jnp.zeros((1, 1, WIDE.width)), caches))

  read_bytes, write_bytes = [], []
  for edges in ((0, WIDE.depth), (0, 1, 3, WIDE.depth)):
    depths = np.diff(edges).tolist()
    caches = jax.eval_shape(lambda d=depths: [KVCache.empty(WIDE, 1, 16, depth=n) for n in d])
    of_parts = functools.partial(read, edges), functools.partial(write, edges)
    read_bytes.append(temporary_bytes(of_parts[0], weights, x, caches))
    write_bytes.append(temporary_bytes(of_parts[1], weights, caches))
  for whole, parts in (read_bytes, write_bytes):
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
