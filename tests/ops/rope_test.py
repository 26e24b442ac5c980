import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


# cos and sin of transformers 5.23 (Qwen2, yarn): head size 32, theta 1e4, 2.5 x 2,048 positions;
# channels 0, 5, 9 and 15, at position 511.
YARN = {"stretch": 2.5, "original_positions": 2048}
YARN_COSINES = (-0.514898, 0.456013, -0.077702, 1.090908)
YARN_SINES = (0.962566, 0.991819, 1.088860, 0.039670)


def test_yarn_turns_as_transformers_does():
  cosines, sines = rope_table(jnp.array([[511]]), 32, THETA, **YARN)
  assert_close(cosines[0, 0, [0, 5, 9, 15]], np.array(YARN_COSINES), absolute=2e-4)
  assert_close(sines[0, 0, [0, 5, 9, 15]], np.array(YARN_SINES), absolute=2e-4)


def test_yarn_keeps_fast_channels_and_slows_slow_ones_by_its_factor():
  positions, factor = jnp.array([[40]]), 4.0
  plain, _ = rope_table(positions, 128, 1e6)
  slowed, _ = rope_table(positions // 4, 128, 1e6)
  yarn, _ = rope_table(positions, 128, 1e6, stretch=factor, original_positions=32768)
  scale = 0.1 * np.log(factor) + 1
  assert_close(yarn[0, 0, :8], plain[0, 0, :8] * scale, absolute=1e-5)
  assert_close(yarn[0, 0, 56:64], slowed[0, 0, 56:64] * scale, absolute=1e-5)


@pytest.mark.parametrize("yarn", [{}, {"stretch": 31.0, "original_positions": 32768}])
def test_at_a_million_positions_angles_have_no_error_but_that_of_float32(yarn):
  """Half a unit in the last place of the frequency, a million times, and of the angle itself."""
  positions = np.array([1, 9_999, 131_071, 999_999])
  exact = exact_frequencies(128, 1e6, **yarn)
  angles = positions[:, None] * exact
  bound = positions[:, None] * np.spacing(exact.astype(np.float32)) / 2
  bound = bound + np.spacing(angles.astype(np.float32)) / 2 + 1e-6  # of cos and sin themselves
  cosines, sines = rope_table(jnp.asarray(positions)[None], 128, 1e6, **yarn)
  scale = 0.1 * np.log(yarn.get("stretch", 1.0)) + 1
  for table, function in ((cosines, np.cos), (sines, np.sin)):
    error = np.abs(np.asarray(table[0, :, :64], np.float64) - scale * function(angles))
    assert (error <= scale * bound).all()


def exact_frequencies(head_size, theta, stretch=1.0, original_positions=1):
  """As the paper of YaRN has them, with the bounds of transformers: 32 turns and one."""
  channel = np.arange(head_size // 2)
  frequencies = theta ** (-2 * channel / head_size)
  if stretch == 1:
    return frequencies

  def at(turns):
    distance = original_positions / (2 * np.pi * turns)
    return head_size * np.log(distance) / (2 * np.log(theta))

  share = np.clip((channel - np.floor(at(32))) / (np.ceil(at(1)) - np.floor(at(32))), 0, 1)
  return frequencies * (1 - share) + frequencies / stretch * share


def test_no_device_computes_frequencies():
  """A TPU's powers are not those of a CPU: the frequencies are constants of the program."""
  for yarn in ({}, YARN):
    table = functools.partial(rope_table, head_size=32, theta=THETA, **yarn)
    program = jax.make_jaxpr(table)(jnp.zeros((1, 4), jnp.int32))
    assert {str(equation.primitive) for equation in program.eqns} <= {
      "convert_element_type", "broadcast_in_dim", "mul", "concatenate", "cos", "sin",
    }  # fmt: skip


def test_queries_are_rounded_only_once_when_they_are_turned_and_scaled():
  x, scale = random(1, 9, 2, 128).astype(jnp.bfloat16), 128**-0.5
  table = rope_table(jnp.arange(9)[None], 128, 1e6)
  exact = apply_rope(x.astype(jnp.float32), *table) * scale
  np.testing.assert_array_equal(apply_rope(x, *table, scale), exact.astype(jnp.bfloat16))
  twice = apply_rope(x, *table) * jnp.asarray(scale, jnp.bfloat16)
  assert (twice != exact.astype(jnp.bfloat16)).mean() > 0.1
