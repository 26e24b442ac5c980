"""What the machine could do at best: its matrix products and its memory, measured.

A floor is the time that work takes if all its flops run at the rate of a matrix product that stays
in the cache, or if all its bytes travel at the rate of a copy, whichever is longer. Only work that
no implementation can avoid is counted: inputs and weights read once, outputs written once.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.benchmarks.timing import Seconds, time_in_turns

_PRODUCT_SIZE = 1536  # three such matrices fit into the last cache of a CPU
_COPY_VALUES = 1 << 26  # 256 MiB, far beyond any cache

FLOAT_BYTES = 4


class Work(NamedTuple):
  """The least that has to be done."""

  flops: float
  bytes: float


class Side(NamedTuple):
  """One phase of a benchmark: who does the work, how often it is done in a run, how much it is."""

  ours: Callable[[], object]
  work: Work
  peer: Callable[[], object] | None = None
  count: int = 1


def compare(
  name: str,
  shapes: Mapping[str, int],
  phases: Mapping[str, Side],
  repeats: int,
  peer: str | None,
  note: str | None = None,
) -> dict[str, Any]:
  """Measures phases, their peers and the machine's limits in turns; returns a report.

  Args:
    name: of the benchmark.
    shapes: what was measured, for the reader.
    phases: in the order in which they have to run.
    repeats: rounds of which medians are taken.
    peer: who the peers are, or None.
    note: what a reader should know, such as why there is no peer.
  """
  sides = {}
  for phase, side in phases.items():
    sides[phase, "ours"] = side.ours
  for phase, side in phases.items():
    if side.peer is not None:
      sides[phase, "peer"] = side.peer
  times = time_in_turns(sides | _limits(), repeats)
  matmul_rate = 2 * _PRODUCT_SIZE**3 / times["matmul"].best
  copy_rate = 2 * _COPY_VALUES * FLOAT_BYTES / times["copy"].best
  return {
    "name": name,
    "device": jax.devices()[0].device_kind,
    "dtype": "float32",
    "threads": num_threads(),
    "shapes": dict(shapes),
    "repeats": repeats,
    "matmul_flops_per_second": matmul_rate,
    "copy_bytes_per_second": copy_rate,
    "peer": peer,
    "note": note,
    "phases": {
      phase: _phase_report(
        side, times[phase, "ours"], times.get((phase, "peer")), matmul_rate, copy_rate
      )
      for phase, side in phases.items()
    },
  }
