"""SIGTERM, and the first Ctrl-C, end a run after its current step, once its state is saved.

If there are several processes, usually only one of them gets the signal. JAX informs the others,
and they agree on a step after which all of them stop. To name that step, each process counts how
often it has asked. This count is the same on all processes. It is not reset between the stages of a
config, while the steps of each stage are counted from 0.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
  """A context in which signals only request a stop; after it they have their former effect."""

  def __init__(self):
    """Handles no signal yet."""
    self._several = jax.distributed.is_initialized()
    self._is_due = False
    self._asked, self._before = 0, {}

  def __enter__(self) -> "Preemption":
    # With several processes, JAX has handled SIGTERM since they were connected.
    own = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
    self._before = {number: signal.signal(number, self._notice) for number in own}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def is_due(self) -> bool:
    """Whether to save and stop now; once it is True, it stays True.

    All processes must call this equally often, for example after each step. Nothing else in the
    program may call `reached_preemption_sync_point`.
    """
    if self._several and not self._is_due:
      self._asked += 1
      self._is_due = multihost_utils.reached_preemption_sync_point(self._asked)
    return self._is_due

  def _notice(self, number, _):
    """Handles a signal."""
    if number == signal.SIGINT:
      signal.signal(number, self._before[number])  # so that the second Ctrl-C ends the program
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._is_due = True
