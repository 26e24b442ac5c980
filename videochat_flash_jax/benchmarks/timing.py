"""Wall-clock times of several pieces of work, measured in turns."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import numpy as np


class Seconds(NamedTuple):
  """Times of one piece of work: the middle and the best of all repeats."""

  median: float
  best: float

  def of_each(self, count: int) -> "Seconds":
    """The time of one of `count` equal parts."""
    return Seconds(self.median / count, self.best / count)


def time_in_turns(
  pieces: Mapping[Hashable, Callable[[], object]], repeats: int
) -> dict[Hashable, Seconds]:
  """Runs A B C, A B C, ..., so that a busy minute strikes all alike.

  Args:
    pieces: name -> work. What it returns is waited for, since JAX returns before it is done.
    repeats: rounds that count; one more goes before, to compile and warm up.
  """
  elapsed = {name: [] for name in pieces}
  for _ in range(repeats + 1):
    for name, work in pieces.items():
      start = time.perf_counter()
      jax.block_until_ready(work())
      elapsed[name].append(time.perf_counter() - start)
  return {
    name: Seconds(float(np.median(times[1:])), min(times[1:])) for name, times in elapsed.items()
  }
