"""Choosing the next token: the most likely one, or a random one of the likely ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.fields import SEED, argument, number
from videochat_flash_jax.shapes import Array, Float, Int


class Sampling(NamedTuple):
  """How tokens are chosen. The default is greedy decoding.

  Attributes:
    temperature: 0 takes the most likely token; 1 samples from the model's probabilities.
    top_p: sample only from the smallest set of tokens whose probabilities add up to this.
    seed: seed of the random numbers. The same seed gives the same answer.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def check(self) -> "Sampling":
    """Checks all values, and returns them as Python's numbers.

    Raises:
      InputError: a value is no number, or is out of range.
    """
    return Sampling(
      argument("temperature", self.temperature, number()),
      argument("top_p", self.top_p, number(above=0, most=1)),
      argument("seed", self.seed, SEED),
    )


def sample(
  logits: Float[Array, "B vocab"],
  key: Array,
  temperature: Float[Array, ""],
  top_p: Float[Array, ""],
) -> Int[Array, "B"]:
  """Chooses one token per row. The choice in a row does not depend on the other rows."""

  def draw():
    """Samples from the tokens within `top_p`."""
    scaled = logits / temperature
    sorted_logits = jnp.sort(scaled, axis=-1, descending=True)
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    sum_of_likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    num_kept = jnp.sum(sum_of_likelier < top_p, axis=-1, keepdims=True)  # at least one: 0 < top_p
    cutoff = jnp.take_along_axis(sorted_logits, num_kept - 1, axis=-1)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, jnp.where(scaled >= cutoff, scaled, -jnp.inf))

  # `cond` runs one branch only. Sorting a large vocabulary for each token would be slow on a CPU.
  token = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
  return token.astype(jnp.int32)
