"""Measures wall-clock times of several pieces of code in turns."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import numpy as np


class Seconds(NamedTuple):
  """Times of one piece of code in seconds: the median and the best of all repeats."""

  median: float
  best: float

  def of_each(self, count: int) -> "Seconds":
    """The time of one of `count` equal parts."""
    return Seconds(self.median / count, self.best / count)


def time_in_turns(
  pieces: Mapping[Hashable, Callable[[], object]], repeats: int
) -> dict[Hashable, Seconds]:
  """Runs A B C, A B C, ..., so that other work on the machine slows all of them equally.

  Args:
    pieces: name -> function. We wait for its result, since JAX returns before it has computed.
    repeats: rounds that count; one more round comes first, to compile and to warm up.
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
