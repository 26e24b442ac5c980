"""A CPU's list of layers and its cache compute what the stack and the stacked cache compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.small_checkpoints import make_model
from tests.conftest import assert_close, quick_jit
from tests.models.lettered_rows import plan_of
from tests.models.small_models import DECODER, fill_randomly, normal
from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.inference.cpu_layers import (
  LayerList,
  LayerListCache,
  unstack,
  unstack_decoder,
)
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.testing.dummy import dummy_model

DEPTH, WIDTH = 3, 4
BATCH, NUM_SLOTS = 2, 7
TOLERANCE = 2e-5


@pytest.fixture
def stack():
  return LayerStack(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), DEPTH, rngs=nnx.Rngs(0))


@pytest.fixture
def layers(stack):
  return unstack(nnx.merge(*jax.tree.map(jnp.copy, nnx.split(stack))))


def apply(layer, index, carry):
  x, num_runs = carry
  return jnp.sin(layer(x) + index), num_runs.at[index].add(1)


def run(layers, x):
  return layers.run(apply, (x, jnp.zeros(DEPTH)))


def out_and_gradient(layers, run=run):
  def total(x):
    out, num_runs = run(layers, x)
    return out.sum(), num_runs

  (out, num_runs), gradient = jax.value_and_grad(total, has_aux=True)(normal(2, WIDTH))
  np.testing.assert_array_equal(num_runs, np.ones(DEPTH))
  return out, gradient


def test_a_list_of_layers_computes_what_the_stack_does_and_so_do_its_gradients(stack, layers):
  out, gradient = out_and_gradient(layers)
  expected_out, expected_gradient = out_and_gradient(stack)
  assert_close(out, expected_out, relative=1e-6)
  assert_close(gradient, expected_gradient, relative=1e-6)


@pytest.mark.parametrize("edges", [(0, 3), (0, 1, 3), (0, 1, 2, 3)])
def test_parts_of_a_list_run_in_order_are_the_whole(stack, layers, edges):
  def run_in_parts(layers, x):
    carry = (x, jnp.zeros(DEPTH))
    for edge in itertools.pairwise(edges):
      carry, layers = layers.run_part(apply, carry, range(*edge))
    return carry

  out, gradient = out_and_gradient(layers, run_in_parts)
  expected_out, expected_gradient = out_and_gradient(stack)
  assert_close(out, expected_out, relative=1e-6)
  assert_close(gradient, expected_gradient, relative=1e-6)


def test_one_layer_of_a_list_is_that_of_the_stack(stack, layers):
  x = normal(2, WIDTH)
  np.testing.assert_array_equal(layers.layer(2)(x), stack.layer(2)(x))


def test_unstacking_frees_the_stack(stack):
  kernel = stack.stacked.kernel[...]
  unstack(stack)
  assert kernel.is_deleted()


@pytest.fixture
def caches():
  """A cache of a list of layers and a stacked one, with the same tokens."""
  pair = [
    kind.empty(DECODER, BATCH, NUM_SLOTS, depth=DECODER.depth)._replace(
      length=jnp.array([[1], [4]])
    )
    for kind in (LayerListCache, KVCache)
  ]
  for layer in range(DECODER.depth):
    pair = [cache.write(layer, *new_tokens(10 * layer)) for cache in pair]
  return pair


def new_tokens(seed):
  shape = BATCH, 2, DECODER.num_kv_heads, DECODER.head_size
  return normal(*shape, seed=seed), normal(*shape, seed=seed + 1)


def assert_same_slots(cache, expected):
  assert (cache.depth, cache.num_slots) == (expected.depth, expected.num_slots)
  np.testing.assert_array_equal(cache.length, expected.length)
  for layer in range(expected.depth):
    for slots, expected_slots in zip(
      *(c.read(layer, jnp.float32) for c in (cache, expected)), strict=True
    ):
      np.testing.assert_array_equal(slots, expected_slots)


def test_a_cache_of_a_list_holds_what_a_stacked_one_does(caches):
  assert_same_slots(*caches)
  assert np.abs(caches[0].read(1, jnp.float32)[0]).max() > 0


def test_a_widened_cache_of_a_list_holds_the_same_tokens(caches):
  assert_same_slots(*(cache.widened(9) for cache in caches))


@pytest.mark.parametrize("num_behind", [0, 1, BATCH])
def test_attention_over_a_cache_of_a_list_is_that_over_a_stacked_one(caches, num_behind):
  q = normal(BATCH, 2, DECODER.num_heads, DECODER.head_size, seed=7)
  k, v = new_tokens(8)
  (out, cache), (expected_out, expected) = [
    cache.attend(1, q, k, v, behind=(read_cache(type(cache)),) * num_behind) for cache in caches
  ]
  assert_close(out, expected_out, relative=1e-6)
  assert_same_slots(cache, expected)


def read_cache(kind):
  """A cache of one row, to stand behind."""
  cache = kind.empty(DECODER, 1, NUM_SLOTS, depth=DECODER.depth)
  for layer in range(DECODER.depth):
    cache = cache.write(layer, *(x[:1] for x in new_tokens(20 + layer)))
  return cache._replace(length=jnp.array([[2]]))


@pytest.fixture(scope="module")
def decoder():
  return fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def unstacked(decoder):
  copied = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(decoder)))
  unstack_decoder(copied)
  return copied


@quick_jit
def read_in_parts(decoder, x, token, length):
  """Two rows behind a cache of one row, read by two parts of the layers; and a token more each."""
  decoder, before, caches, steps = nnx.merge(*decoder), x[:1, :3], [], []
  for layers in (range(1), range(1, DECODER.depth)):
    empty = functools.partial(decoder.cache_type.empty, DECODER, depth=len(layers))
    before, behind = decoder.read(before, empty(1, 3), jnp.array([3]), layers=layers)
    options = {"layers": layers, "behind": (behind,)}
    x, cache = decoder.read(x, empty(2, 8), length, **options)
    token, cache = decoder.read(token, cache, jnp.ones_like(length), **options)
    caches += [behind, cache]
    steps += [x, token]
  return steps, caches


def test_an_unstacked_decoder_reads_what_the_stacked_one_does(decoder, unstacked):
  x, token = normal(2, 6, DECODER.width), normal(2, 1, DECODER.width, seed=1)
  length = jnp.array([6, 4])
  steps, caches = read_in_parts(nnx.split(unstacked), x, token, length)
  expected_steps, expected_caches = read_in_parts(nnx.split(decoder), x, token, length)
  assert [type(cache) for cache in caches] == [LayerListCache] * 4
  for step, expected in zip(steps, expected_steps, strict=True):
    for row, num_tokens in enumerate(length.tolist()):
      assert_close(step[row, :num_tokens], expected[row, :num_tokens], relative=TOLERANCE)
  for cache, expected in zip(caches, expected_caches, strict=True):
    np.testing.assert_array_equal(cache.length, expected.length)


ROWS = ("S v v v v ?", "S v v ?")
DROPOUT = DropoutConfig("attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25))


def test_an_unstacked_decoder_drops_the_tokens_that_the_stacked_one_drops(decoder, unstacked):
  x, plan = normal(2, 6, DECODER.width), plan_of(DROPOUT, *ROWS, training=True)
  hidden, kept = quick_jit(lambda x: unstacked.read_and_drop(x, plan))(x)
  expected_hidden, expected_kept = quick_jit(lambda x: decoder.read_and_drop(x, plan))(x)
  np.testing.assert_array_equal(kept, expected_kept)
  assert_close(hidden, expected_hidden, relative=TOLERANCE)


def test_the_engine_unstacks_its_decoder_on_a_cpu():
  model = dummy_model()
  engine = Engine(model, stop_ids=[3])
  assert isinstance(model.decoder.layers, LayerList)
  assert isinstance(engine.read([np.arange(5, 25)], 4).caches[0], LayerListCache)


def test_int8_layers_of_a_list_compute_what_their_stack_does():
  model = load_model(make_model, checkpoint_directory("tiny"), weights="int8")
  x = normal(1, 5, model.config.decoder.width)
  expected = model.decoder(x)
  unstack_decoder(model.decoder)
  kernel = model.decoder.layers.layer(0).up_proj.kernel[...]
  assert (kernel.qvalue.dtype, kernel.scale.shape) == (jnp.int8, (1, kernel.shape[1]))
  assert_close(model.decoder(x), expected, relative=TOLERANCE)
