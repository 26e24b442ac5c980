"""Times the phases of a benchmark, compared with a peer and with the limits of the machine."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.benchmarks.floors import Limits, Work, limit_pieces, measured_limits
from videochat_flash_jax.benchmarks.timing import Seconds, time_in_turns

NO_PEER = "no peer: pip install 'videochat_flash_jax[bench]'"


class Phase(NamedTuple):
  """One part of a benchmark, such as prefill.

  Attributes:
    ours: runs our code.
    work: the least work of one of the `count` equal parts.
    peer: runs the peer's code; None without a peer.
    count: number of equal parts in one run, such as decoded tokens.
  """

  ours: Callable[[], object]
  work: Work
  peer: Callable[[], object] | None = None
  count: int = 1


def compare(
  name: str,
  phases: Mapping[str, Phase],
  *,
  shapes: Mapping[str, int],
  repeats: int,
  peer: str | None = None,
) -> dict[str, Any]:
  """Times our code, the peer's code and the limits of the machine in turns, in the same minutes.

  Args:
    name: of the benchmark.
    phases: in the order in which they run.
    shapes: sizes of the measured arrays.
    repeats: number of runs; the report has their median.
    peer: its name, with a version; None without one.

  Returns:
    A report for JSON. All times are in seconds; a ratio to the peer below 1 means that we are
    faster.
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
    "note": None if peer else NO_PEER,
    "phases": {
      phase_name: _report(phase, times[phase_name, "ours"], times.get((phase_name, "peer")), limits)
      for phase_name, phase in phases.items()
    },
  }


def _report(phase: Phase, ours: Seconds, peer: Seconds | None, limits: Limits) -> dict[str, Any]:
  """The report of one phase: our time, and its ratios to the floor and to the peer's time."""
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


def installed(*packages: str) -> bool:
  """Whether a peer can be imported."""
  return all(importlib.util.find_spec(package) for package in packages)


def usable_cores() -> int:
  """Number of cores that this process may use; XLA on the CPU uses them all."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def random_weights(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """The graph of a model and small random weights; the model's own initialisers take minutes.

  Args:
    make_model: builds the model; only its shapes are used.
  """
  graph, shapes = nnx.split(nnx.eval_shape(make_model))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)), shapes
  )
  return graph, weights
