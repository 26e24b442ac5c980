"""Records a profile of some steps of a run in a folder, for TensorBoard or xprof."""

from pathlib import Path
from typing import Any

import jax


class Profile:
  """A context that traces some of the steps in it; its end stops a trace that is still running."""

  def __init__(self, steps: tuple[int, ...], folder: Path):
    """Traces from the first to the last of `steps`, or nothing if there are none."""
    self._first, self._last = steps or (0, 0)
    self._folder, self._is_tracing = folder, False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_):
    self._stop()

  def before(self, step: int):
    """Call this right before a step is dispatched."""
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._is_tracing = True

  def after(self, step: int, metrics: Any):
    """Call this right after a step is dispatched; waits for the results of the last traced step."""
    if step == self._last:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self):
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()
