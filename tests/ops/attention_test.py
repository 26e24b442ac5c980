import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops import attention as module
from videochat_flash_jax.ops import blockwise, splash
from videochat_flash_jax.ops.attention import attention

BATCH, QUERIES, KEYS, HEAD_SIZE = 2, 37, 53, 8


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(num_heads=4, num_kv_heads=2, queries=QUERIES, keys=KEYS):
  q = random(BATCH, queries, num_heads, HEAD_SIZE) / np.sqrt(HEAD_SIZE)
  k = random(BATCH, keys, num_kv_heads, HEAD_SIZE, seed=1)
  return q, k, random(BATCH, keys, num_kv_heads, HEAD_SIZE, seed=2)


def one_by_one(q, k, v, sees):
  """Attention in float64, one query and head at a time; `sees(row, query, key)` is the mask."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for row, query, head in np.ndindex(q.shape[:3]):
    keys = [key for key in range(k.shape[1]) if sees(row, query, key)]
    scores = k[row, keys, head // group] @ q[row, query, head]
    weights = np.exp(scores - scores.max())
    out[row, query, head] = weights @ v[row, keys, head // group] / weights.sum()
  return out


FIRST_ORDER = [9, 0]  # of each row's queries among its keys
SEGMENT_LENGTH = [20, 9]  # of each row
ORDER = jnp.stack([first + jnp.arange(QUERIES) for first in FIRST_ORDER])
SEGMENTS = {
  "query_segments": jnp.stack([jnp.arange(QUERIES) // length for length in SEGMENT_LENGTH]),
  "key_segments": jnp.stack([jnp.arange(KEYS) // length for length in SEGMENT_LENGTH]),
}


def same_segment(row, query, key):
  return query // SEGMENT_LENGTH[row] == key // SEGMENT_LENGTH[row]


CASES = {
  "all": ({}, lambda row, query, key: True),
  "causal": ({"causal": True}, lambda row, query, key: key <= query),
  "continued": (
    {"causal": True, "query_order": ORDER},
    lambda row, query, key: key <= FIRST_ORDER[row] + query,
  ),
  "order without causal": ({"query_order": ORDER}, lambda row, query, key: True),
  "packed": (SEGMENTS, same_segment),
  "packed, causal": (
    {"causal": True, **SEGMENTS},
    lambda row, query, key: key <= query and same_segment(row, query, key),
  ),
}


@pytest.fixture(params=["dense", "blockwise", "splash"])
def implementation(request, monkeypatch):
  # Several blocks and several spans, the last of each not full.
  monkeypatch.setattr(blockwise, "_TILE_QUERIES", 6)
  monkeypatch.setattr(blockwise, "_TILE_KEYS", 7)
  monkeypatch.setattr(splash, "_INTERPRET", True)
  return request.param


def compiled(implementation, **arguments):
  """The attention as one program, which takes less time than calling it op by op."""
  return jax.jit(functools.partial(attention, implementation=implementation, **arguments))


def gradients(implementation, qkv, **arguments):
  """Gradients of a weighted sum of the results, with respect to q, k and v."""
  weights = random(*qkv[0].shape, seed=3)

  def loss(*qkv):
    return jnp.sum(weights * attention(*qkv, implementation=implementation, **arguments))

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_a_softmax_over_what_a_query_sees(implementation, case):
  arguments, sees = CASES[case]
  q, k, v = operands()
  out = compiled(implementation, **arguments)(q, k, v)
  assert_close(out, one_by_one(q, k, v, sees), relative=1e-6)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (3, 3), (6, 3), (6, 1)])
def test_query_heads_share_key_heads_in_order(implementation, num_heads, num_kv_heads):
  q, k, v = operands(num_heads, num_kv_heads)
  out = compiled(implementation)(q, k, v)
  assert_close(out, one_by_one(q, k, v, CASES["all"][1]), relative=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 23, 24, 25, 48, 49])
def test_no_length_is_too_odd(implementation, length):
  q, k, v = operands(queries=length, keys=length)
  out = compiled(implementation, causal=True)(q, k, v)
  assert_close(out, one_by_one(q, k, v, CASES["causal"][1]), relative=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["blockwise", "splash"], indirect=True)
def test_gradients_are_those_of_the_reference(implementation, case):
  arguments, _ = CASES[case]
  ours, dense = (gradients(name, operands(), **arguments) for name in (implementation, "dense"))
  for one, other in zip(ours, dense, strict=True):
    assert_close(one, other, relative=2e-6)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(3, 3), (6, 1)])
@pytest.mark.parametrize("implementation", ["blockwise", "splash"], indirect=True)
@pytest.mark.slow
def test_a_key_head_gets_gradients_from_all_its_query_heads(
  implementation, num_heads, num_kv_heads
):
  qkv = operands(num_heads, num_kv_heads)
  arguments, _ = CASES["packed, causal"]
  ours, dense = (gradients(name, qkv, **arguments) for name in (implementation, "dense"))
  for one, other in zip(ours, dense, strict=True):
    assert_close(one, other, relative=2e-6)


@pytest.mark.parametrize("implementation", ["blockwise", "splash"], indirect=True)
def test_a_query_that_sees_nothing_has_no_gradients(implementation):
  segments = SEGMENTS["query_segments"].at[0, :5].set(-1)  # no key has this segment
  arguments = {"query_segments": segments, "key_segments": SEGMENTS["key_segments"]}
  d_q, *d_kv = gradients(implementation, operands(), **arguments)
  np.testing.assert_array_equal(d_q[0, :5], 0)
  assert all(jnp.isfinite(gradient).all() for gradient in (d_q, *d_kv))


@pytest.fixture
def calls(monkeypatch):
  """Names of the implementations that are called."""
  calls = []
  for name in module._IMPLEMENTATIONS:
    stub = lambda q, *_, name=name: calls.append(name) or q  # noqa: E731
    monkeypatch.setitem(module._IMPLEMENTATIONS, name, stub)
  return calls


@pytest.mark.parametrize("platform, name", [("cpu", "blockwise"), ("tpu", "splash")])
def test_the_implementation_is_chosen_by_size_and_platform(monkeypatch, calls, platform, name):
  monkeypatch.setattr(module, "target_platform", lambda: platform)
  for queries, keys in [(1, 100_000), (256, 256), (256, 257)]:
    q, k = jnp.zeros((1, queries, 1, 1)), jnp.zeros((1, keys, 1, 1))
    attention(q, k, k)
  assert calls == ["dense", "dense", name]


@pytest.mark.parametrize(
  "capability, name",
  [("7.5", "blockwise"), ("8.0", "cudnn"), ("12.0", "cudnn"), ("gfx90a", "blockwise")],
)
def test_cudnn_is_chosen_for_gpus_that_have_it(monkeypatch, calls, capability, name):
  gpu = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(module, "target_platform", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [gpu])
  q = jnp.zeros((1, 512, 1, 8))
  attention(q, q, q)
  assert calls == [name]


@pytest.fixture
def cudnn(monkeypatch):
  """Puts jax's own implementation in the place of cuDNN; gives the list of its calls."""
  calls = []

  def on_any_device(*args, implementation, **kwargs):
    calls.append(implementation)
    return jax_attention(*args, implementation="xla", **kwargs)

  jax_attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", on_any_device)
  return calls


@pytest.mark.parametrize("case", ["all", "causal", "order without causal"])
def test_cudnn_is_given_what_it_can_do(cudnn, case):
  arguments, sees = CASES[case]
  q, k, v = (x.astype(jnp.bfloat16) for x in operands(keys=QUERIES))
  out = attention(q, k, v, implementation="cudnn", **arguments)
  assert cudnn == ["cudnn"]
  assert_close(out, one_by_one(q, k, v, sees), relative=5e-3)


@pytest.mark.parametrize(
  "case, dtype",
  [
    ("all", jnp.float32),
    ("causal", jnp.bfloat16),  # fewer queries than keys
    ("continued", jnp.bfloat16),
    ("packed", jnp.bfloat16),
    ("packed, causal", jnp.bfloat16),
  ],
)
def test_cudnn_is_not_given_what_it_cannot_do(cudnn, case, dtype):
  arguments, sees = CASES[case]
  q, k, v = (x.astype(dtype) for x in operands())
  out = attention(q, k, v, implementation="cudnn", **arguments)
  assert not cudnn
  assert_close(out, one_by_one(q, k, v, sees), relative=5e-3)


def test_a_query_that_sees_nothing_gives_finite_numbers(implementation):
  q, k, v = operands()
  apart = {
    "query_segments": jnp.zeros((BATCH, QUERIES), jnp.int32),
    "key_segments": jnp.ones((BATCH, KEYS), jnp.int32),
  }
  assert jnp.isfinite(compiled(implementation, **apart)(q, k, v)).all()


def test_large_scores_do_not_overflow(implementation):
  q, k, v = operands()
  out = compiled(implementation)(100 * q, 100 * k, v)
  assert_close(out, one_by_one(100 * q, 100 * k, v, CASES["all"][1]), relative=1e-4)


def test_bfloat16_is_summed_in_float32(implementation):
  # 256 + 1 is 256 in bfloat16: sums of equal weights and values would stop there.
  q = jnp.zeros((1, 1, 1, 2), jnp.bfloat16)
  k, v = jnp.zeros((1, 4096, 1, 2), jnp.bfloat16), jnp.ones((1, 4096, 1, 2), jnp.bfloat16)
  out = compiled(implementation)(q, k, v)
  assert out.dtype == jnp.bfloat16
  assert_close(out, np.ones(out.shape), absolute=0.0)


def test_few_queries_of_a_long_cache_are_multiplied_with_all_keys_at_once(monkeypatch):
  q, k, v = operands(queries=16, keys=96)
  order = jnp.full((1, 1), 70)
  monkeypatch.setattr(module, "_DENSE_SCORES", 100)
  wanted = blockwise.attend(q, k, v, True, jnp.broadcast_to(order, (1, 16)), None, None)
  calls = []
  monkeypatch.setattr(blockwise, "attend", lambda *operands: calls.append(operands) or wanted)
  few = module.partial_attention(q, k, v, order)
  assert not calls
  monkeypatch.setattr(module, "_CACHED_SCORES", few.lse.size * 96)
  assert module.partial_attention(q, k, v, order) is wanted and len(calls) == 1
  for one, other in zip(few, wanted, strict=True):
    assert_close(one, other, relative=2e-6)
