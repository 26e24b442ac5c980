"""A benchmark's phases, timed beside a peer and the machine's limits; and the report of it."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.benchmarks.floors import Limits, Work, limit_pieces, measured_limits
from videochat_flash_jax.benchmarks.timing import Seconds, time_in_turns


class Phase(NamedTuple):
  """Something to time."""

  ours: Callable[[], object]
  work: Work  # of one of `count` equal parts
  peer: Callable[[], object] | None = None
  count: int = 1  # equal parts in a run, such as decoded tokens


def compare(
  name: str,
  phases: Mapping[str, Phase],
  *,
  shapes: Mapping[str, int],
  repeats: int,
  peer: str | None = None,
  note: str | None = None,
) -> dict[str, Any]:
  """Times phases, ours and the peer's in turns, in the same minutes as the machine's limits.

  Args:
    name: the benchmark's.
    phases: in the order in which they run.
    shapes: sizes of what is measured.
    repeats: runs of which the median counts.
    peer: what we are compared with.
    note: what a reader of the report should know.

  Returns:
    A report for JSON: all times in seconds, ratios below 1 where we are ahead of the peer.
  """
  pieces = dict(limit_pieces())
  for phase_name, phase in phases.items():
    pieces[phase_name, "ours"] = phase.ours
    if phase.peer is not None:
      pieces[phase_name, "peer"] = phase.peer
  times = time_in_turns(pieces, repeats)
  limits = measured_limits(times)
  return {
    "name": name,
    "device": jax.devices()[0].device_kind,
    "dtype": "float32",
    "threads": usable_cores(),
    "shapes": dict(shapes),
    "repeats": repeats,
    "limits": limits._asdict(),
    "peer": peer,
    "note": note,
    "phases": {
      phase_name: _report(phase, times[phase_name, "ours"], times.get((phase_name, "peer")), limits)
      for phase_name, phase in phases.items()
    },
  }


def _report(phase: Phase, ours: Seconds, peer: Seconds | None, limits: Limits) -> dict[str, Any]:
  """One phase: our time, beside the floor's and the peer's."""
  ours = ours.of_each(phase.count)
  floor, bound = limits.floor(phase.work)
  report = {
    "seconds": ours.median,
    "best_seconds": ours.best,
    "flops": phase.work.flops,
    "bytes": phase.work.bytes,
    "floor_seconds": floor,
    "floor_bound_by": bound,
    "ratio_to_floor": ours.median / floor,
    "peer_seconds": None,
    "peer_best_seconds": None,
    "ratio_to_peer": None,
  }
  if peer is not None:
    peer = peer.of_each(phase.count)
    report["peer_seconds"], report["peer_best_seconds"] = peer
    report["ratio_to_peer"] = ours.median / peer.median
  return report


def usable_cores() -> int:
  """Cores that this process may use; XLA on the CPU uses them all."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def random_weights(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """A model's graph, and small random weights: its initialisers would take minutes."""
  graph, shapes = nnx.split(nnx.eval_shape(make_model))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)), shapes
  )
  return graph, weights
