import jax.numpy as jnp
import numpy as np

from tests.conftest import assert_close
from videochat_flash_jax.ops.rope import apply_rope, rope_table

HEAD_SIZE, THETA = 8, 1e4


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def turned(x, positions, theta=THETA):
  return apply_rope(x, *rope_table(positions, x.shape[-1], theta))


def test_channel_pairs_turn_as_complex_numbers():
  x, positions = random(2, 5, 3, HEAD_SIZE), jnp.array([[0, 1, 2, 3, 4], [7, 7, 0, 900, 3]])
  first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
  frequencies = THETA ** (-np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
  angles = np.asarray(positions)[..., None, None] * frequencies
  expected = (first + 1j * second) * np.exp(1j * angles)
  expected = np.concatenate([expected.real, expected.imag], axis=-1)
  assert_close(turned(x, positions), expected, relative=1e-4)  # float32 angles of about 900


def test_position_zero_changes_nothing():
  x = random(1, 1, 2, HEAD_SIZE)
  assert_close(turned(x, jnp.zeros((1, 1), jnp.int32)), x)


def test_products_depend_on_the_distance_only():
  q, k = random(1, 1, 1, HEAD_SIZE), random(1, 1, 1, HEAD_SIZE, seed=1)

  def product(query_at, key_at):
    turned_q, turned_k = turned(q, jnp.array([[query_at]])), turned(k, jnp.array([[key_at]]))
    return jnp.sum(turned_q * turned_k)

  assert_close(product(40, 7), product(33, 0), absolute=1e-5)
  assert abs(product(40, 7) - product(40, 8)) > 1e-2


def test_far_positions_differ_in_bfloat16_too():
  x = jnp.ones((1, 2, 1, HEAD_SIZE), jnp.bfloat16)
  out = turned(x, jnp.array([[100_000, 100_001]]))
  assert out.dtype == jnp.bfloat16
  exact = turned(x.astype(jnp.float32), jnp.array([[100_000, 100_001]]))
  assert_close(out, exact, absolute=1e-2)
  assert abs(out[0, 0] - out[0, 1]).max() > 0.3
