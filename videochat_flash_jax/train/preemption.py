"""SIGTERM, and the first Ctrl-C, end a run behind its current step, when all is saved.

Of several processes mostly one alone gets the signal; JAX tells the others, and they agree on a
step at which all of them stop. For that they count how often each has asked, which is the same for
all, and goes on over the stages of a run, whose steps begin at 0 again.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Within it signals are noticed; behind it they do what they did before."""

  def __init__(self):
    """Notices nothing yet."""
    self._several = jax.distributed.is_initialized()
    self._is_due = False
    self._asked, self._before = 0, {}

  def __enter__(self) -> "Preemption":
    # Where there are several processes, JAX has taken over SIGTERM when they joined.
    own = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
    self._before = {number: signal.signal(number, self._notice) for number in own}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def is_due(self) -> bool:
    """Whether to save and to end now; once it is so, it stays so.

    Every process asks at the same places: behind each step, say. Nobody else may ask JAX.
    """
    if self._several and not self._is_due:
      self._asked += 1
      self._is_due = multihost_utils.reached_preemption_sync_point(self._asked)
    return self._is_due

  def _notice(self, number, _):
    if number == signal.SIGINT:
      signal.signal(number, self._before[number])  # the second one ends the program at once
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._is_due = True
