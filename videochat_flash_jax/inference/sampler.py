"""Choosing the next token: greedily, or at random from the likely ones."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.shapes import Array, Float, Int


class Sampling(NamedTuple):
  """How tokens are chosen; the default is greedy.

  Attributes:
    temperature: 0 takes the most likely token; 1 follows the model's probabilities.
    top_p: sample only from the smallest set of tokens that holds this probability.
    seed: of the random numbers; the same seed gives the same answer.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def check(self) -> "Sampling":
    """Returns itself.

    Raises:
      InputError: a value out of range.
    """
    if not 0 <= self.temperature < math.inf:
      raise InputError(f"temperature is {self.temperature}; use 0 for greedy answers, or more")
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p is {self.top_p}; use a value above 0 and at most 1")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed is {self.seed}; use a whole number from 0 to {2**32 - 1}")
    return self


def sample(
  logits: Float[Array, "B vocab"],
  key: Array,
  temperature: Float[Array, ""],
  top_p: Float[Array, ""],
) -> Int[Array, "B"]:
  """Chooses one token a row; a row's choice does not depend on the other rows."""

  def draw():
    scaled = logits / temperature
    likely_first = jnp.sort(scaled, axis=-1, descending=True)
    probabilities = jax.nn.softmax(likely_first, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens
    num_kept = jnp.sum(before < top_p, axis=-1, keepdims=True)  # at least one: 0 < top_p
    cutoff = jnp.take_along_axis(likely_first, num_kept - 1, axis=-1)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, jnp.where(scaled >= cutoff, scaled, -jnp.inf))

  # A branch, not a select: sorting a large vocabulary for each token is slow on a CPU.
  token = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
  return token.astype(jnp.int32)
