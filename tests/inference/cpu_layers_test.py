"""A CPU's list of layers and its cache compute what the stack and the stacked cache compute."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.models.lettered_rows import plan_of
from tests.models.small_models import DECODER, fill_randomly, normal
from videochat_flash_jax.inference.cpu_layers import (
  LayerList,
  LayerListCache,
  unstack,
  unstack_decoder,
)
from videochat_flash_jax.inference.engine import Engine, Prompt
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
    kind.empty(DECODER, BATCH, NUM_SLOTS, depth=DECODER.depth)._replace(length=jnp.array([1, 4]))
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
    for slots, expected_slots in zip(cache.read(layer), expected.read(layer), strict=True):
      np.testing.assert_array_equal(slots, expected_slots)


def test_a_cache_of_a_list_holds_what_a_stacked_one_does(caches):
  assert_same_slots(*caches)
  assert np.abs(caches[0].read(1)[0]).max() > 0


def test_a_widened_cache_of_a_list_holds_the_same_tokens(caches):
  assert_same_slots(*(cache.widened(9) for cache in caches))


@pytest.mark.parametrize("is_empty", [False, True])
def test_attention_over_a_cache_of_a_list_is_that_over_a_stacked_one(caches, is_empty):
  q = normal(BATCH, 2, DECODER.num_heads, DECODER.head_size, seed=7)
  k, v = new_tokens(8)
  (out, cache), (expected_out, expected) = [
    cache.attend(1, q, k, v, is_empty=is_empty) for cache in caches
  ]
  assert_close(out, expected_out, relative=1e-6)
  assert_same_slots(cache, expected)


@pytest.fixture(scope="module")
def decoder():
  return fill_randomly(lambda: Qwen2(DECODER, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def unstacked(decoder):
  copied = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(decoder)))
  unstack_decoder(copied)
  return copied


@nnx.jit(static_argnames="num_slots")
def prefill(decoder, x, length, num_slots, plan=None):
  return decoder.prefill(x, length, num_slots, plan)


@nnx.jit
def extend(decoder, x, caches):
  return decoder.extend(x, caches, jnp.ones(len(x), jnp.int32))


ROWS = ("S v v v v ?", "S v v ?")
DROPOUT = DropoutConfig("attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25))


@pytest.mark.parametrize("plan", [None, plan_of(DROPOUT, *ROWS)], ids=["all_tokens", "dropout"])
def test_an_unstacked_decoder_reads_and_writes_what_the_stacked_one_does(decoder, unstacked, plan):
  x, token = normal(2, 6, DECODER.width), normal(2, 1, DECODER.width, seed=1)
  length = jnp.array([len(row.split()) for row in ROWS])
  hidden, caches = prefill(unstacked, x, length, 8, plan)
  expected_hidden, expected_caches = prefill(decoder, x, length, 8, plan)
  assert [type(cache) for cache in caches] == [LayerListCache] * len(expected_caches)
  for row, num_tokens in enumerate(expected_caches[-1].length.tolist()):
    assert_close(hidden[row, :num_tokens], expected_hidden[row, :num_tokens], relative=TOLERANCE)
  hidden, caches = extend(unstacked, token, caches)
  expected_hidden, expected_caches = extend(decoder, token, expected_caches)
  assert_close(hidden, expected_hidden, relative=TOLERANCE)
  for cache, expected in zip(caches, expected_caches, strict=True):
    np.testing.assert_array_equal(cache.length, expected.length)


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
  no_tokens = jnp.zeros((1, engine.config.decoder.width), engine.dtype)
  prompt = Prompt(np.arange(5, 25), np.full(20, -1, np.int32), no_tokens)
  assert isinstance(engine.read([prompt], 4).caches[0], LayerListCache)
