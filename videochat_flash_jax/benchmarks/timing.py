"""Wall-clock times of several sides of a comparison, measured in turns."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Seconds(NamedTuple):
  """Times of one side: the middle and the best of all repeats."""

  median: float
  best: float

  def each(self, count: int) -> "Seconds":
    """The time of one of `count` equal parts."""
    return Seconds(self.median / count, self.best / count)


def time_in_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Seconds]:
  """Runs A B C, A B C, ... so that a busy minute strikes all sides alike.

  One round before the first that counts compiles and warms up.

  Args:
    sides: name -> work. What it returns is waited for, so that JAX's work is done.
    repeats: rounds that count.
  """
  elapsed = {name: [] for name in sides}
  for _ in range(repeats + 1):
    for name, work in sides.items():
      start = time.perf_counter()
      jax.block_until_ready(work())
      elapsed[name].append(time.perf_counter() - start)
  return {
    name: Seconds(float(np.median(times[1:])), min(times[1:])) for name, times in elapsed.items()
  }


def random_weights(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """A model's graph and random float32 weights, for speed alone.

  The initialisers of billions of weights would take longer than what is measured.
  """
  graph, shapes = nnx.split(nnx.eval_shape(make_model))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02), shapes
  )
  return graph, weights
