import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from tests.models.small_models import normal
from videochat_flash_jax.ops.received_attention import received_attention

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 3, 41, 6, 2, 8
SEGMENTS = np.array([[1] * 41, [1] * 20 + [2] * 15 + [0] * 6, [3] * 2 + [4] * 30 + [0] * 9])


@pytest.fixture(scope="module")
def inputs():
  q = normal(BATCH, LENGTH, HEADS, SIZE, scale=2.0 / SIZE**0.5)
  k = normal(BATCH, LENGTH, KV_HEADS, SIZE, seed=1)
  asks = np.random.default_rng(2).random((BATCH, LENGTH)) < [[0.6], [0.3], [0.05]]
  return q, k, asks & (SEGMENTS > 0)


def expected(q, k, asks, segments):
  """The definition, in float64, one asking token at a time."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  total, count = np.zeros(asks.shape), np.zeros(asks.shape)
  for row, token in np.argwhere(asks):
    seen = (segments[row] == segments[row, token]) & (np.arange(LENGTH) <= token)
    for head in range(HEADS):
      scores = k[row, :, head * KV_HEADS // HEADS] @ q[row, token, head]
      weights = np.where(seen, np.exp(scores), 0)
      total[row] += weights / weights.sum() / HEADS
    count[row] += segments[row] == segments[row, token]
  return total / np.maximum(count, 1)


def test_it_is_the_mean_over_heads_and_over_the_tokens_that_ask(inputs):
  q, k, asks = inputs
  assert asks.sum(axis=1).min() >= 1 and asks.sum(axis=1).max() > 16  # several blocks
  received = jax.jit(received_attention)(q, k, jnp.asarray(asks), jnp.asarray(SEGMENTS))
  assert_close(received, expected(q, k, asks, SEGMENTS), absolute=1e-6)


def test_the_worked_example_of_two_asking_tokens_holds():
  q, k = jnp.ones((1, 2, 1, 1)), jnp.log(jnp.array([3.0, 7.0])).reshape(1, 2, 1, 1)
  received = received_attention(q, k, jnp.array([[True, True]]), jnp.ones((1, 2), jnp.int32))
  assert_close(received, [[(1 + 0.3) / 2, 0.7 / 2]], absolute=1e-6)


def test_without_asking_tokens_nothing_is_received(inputs):
  q, k, _ = inputs
  nothing = jnp.zeros((BATCH, LENGTH), bool)
  np.testing.assert_array_equal(received_attention(q, k, nothing, jnp.asarray(SEGMENTS)), 0)


def test_bfloat16_keys_give_float32_means(inputs):
  q, k, asks = inputs
  rough = received_attention(
    q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), jnp.asarray(asks), jnp.asarray(SEGMENTS)
  )
  assert rough.dtype == jnp.float32
  assert_close(rough, expected(q, k, asks, SEGMENTS), absolute=0.02)
