"""Token sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.sampler import Sampling, sample

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.1])


def draw(temperature, top_p, num_draws=4000):
  logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (num_draws, 1))
  tokens = sample(logits, jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
  return np.bincount(np.asarray(tokens), minlength=4) / num_draws


def test_temperature_zero_takes_the_likeliest():
  np.testing.assert_array_equal(draw(0.0, 1.0), [1, 0, 0, 0])


def test_temperature_one_follows_the_probabilities():
  np.testing.assert_allclose(draw(1.0, 1.0), PROBABILITIES, atol=0.03)


def test_temperature_sharpens():
  sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  np.testing.assert_allclose(draw(0.5, 1.0), sharp, atol=0.03)


@pytest.mark.parametrize("top_p, kept", [(0.4, 1), (0.6, 2), (0.76, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p, kept):
  expected = np.where(np.arange(4) < kept, PROBABILITIES, 0)
  np.testing.assert_allclose(draw(1.0, top_p), expected / expected.sum(), atol=0.03)


def test_a_row_draws_the_same_alone_and_in_company():
  logits = jax.random.normal(jax.random.key(1), (5, 50))
  draws = [
    np.asarray(sample(rows, jax.random.key(2), jnp.float32(1.0), jnp.float32(0.9)))
    for rows in (logits, logits[:2])
  ]
  np.testing.assert_array_equal(draws[0][:2], draws[1])


@pytest.mark.parametrize(
  "bad",
  [
    Sampling(temperature=-1),
    Sampling(temperature=float("nan")),
    Sampling(temperature=float("inf")),
    Sampling(top_p=0),
    Sampling(top_p=1.5),
    Sampling(seed=-1),
    Sampling(seed=1 << 40),
    Sampling(temperature=True),
    Sampling(temperature="0"),
    Sampling(top_p=None),
    Sampling(seed=1.0),
    Sampling(seed=True),
  ],
)
def test_values_out_of_range_and_of_another_type_are_refused(bad):
  with pytest.raises(InputError, match=r"^(temperature|top_p|seed) is .*: give an? "):
    bad.check()


def test_numbers_of_numpy_are_numbers():
  checked = Sampling(np.float32(0.5), np.float64(1), np.int64(7)).check()
  assert checked == Sampling(0.5, 1.0, 7) and set(map(type, checked)) == {int, float}
