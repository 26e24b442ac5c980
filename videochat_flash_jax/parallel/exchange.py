"""Texts that the processes of a run, or some of them, tell each other, from any thread.

They go through the store of the service that connects the processes. Collective operations of the
devices would be compiled anew for each length of a text, and would wait for the devices. They must
also run in the same order on all processes: a thread that reads batches beside the steps could not
use them. These are the keys in the store:

  1/17/3      what process 3 told in turn 17 of the exchange "1"; the first process takes it
  1/17/all    the texts of all processes in turn 17, which the first process sends to the others
"""

import json
import threading
from collections.abc import Sequence
from typing import Protocol

import jax
from jax._src import distributed

# After so many seconds a waiting thread looks whether it is to stop. The end of a process is not
# found here: JAX notices it, and ends the other processes.
_SECONDS = 0.25


class Store(Protocol):
  """Texts by keys that all processes see. A key is set once."""

  def set(self, key: str, text: str):
    """Stores a text."""

  def get(self, key: str, seconds: float) -> str | None:
    """Waits for a text; None if it is not there after so many seconds."""

  def delete(self, key: str):
    """Deletes a key, if it is there, and all keys that begin with it and a slash."""


class CoordinationStore:
  """The store of the service that connects the processes of a run."""

  def set(self, key: str, text: str):
    """See `Store`."""
    _client().key_value_set(key, text)

  def get(self, key: str, seconds: float) -> str | None:
    """See `Store`."""
    try:
      return _client().blocking_key_value_get(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      return None

  def delete(self, key: str):
    """See `Store`."""
    _client().key_value_delete(key)


def _client():
  # JAX has no public function for it. Orbax uses this one, too.
  return distributed.global_state.client


class Interrupted(Exception):
  """`Exchange.interrupt` was called while this thread waited for another process."""


class Exchange:
  """One of several processes that tell each other texts, turn by turn.

  Attributes:
    processes: their numbers; the first one collects the texts.
    here: the number of this process.
  """

  def __init__(self, name: str, processes: Sequence[int], here: int, store: Store):
    """Starts before the first turn.

    Args:
      name: of the exchange, the same on its processes, and not used before in this run.
      processes: that take part, in the same order on each.
      here: the number of this process.
      store: that all of them see.
    """
    self.processes, self.here = tuple(processes), here
    self._name, self._store = name, store
    self._turn, self._interrupted = 0, threading.Event()

  def tell(self, text: str) -> list[str]:
    """Tells a text; returns those that all told in this turn, in the order of `processes`.

    It waits until all have told theirs, however long that takes.

    Raises:
      Interrupted: `interrupt` was called.
    """
    self._turn += 1
    turn, (first, *others) = f"{self._name}/{self._turn}", self.processes
    if self.here != first:
      self._store.set(f"{turn}/{self.here}", text)
      return json.loads(self._wait(f"{turn}/all"))
    texts = [text, *(self._wait(f"{turn}/{process}") for process in others)]
    self._store.set(f"{turn}/all", json.dumps(texts))
    # Whoever has told a text in this turn has read those of the turn before.
    self._store.delete(f"{self._name}/{self._turn - 1}")
    return texts

  def interrupt(self):
    """Makes `tell` raise `Interrupted`, in the thread that waits now, and from now on."""
    self._interrupted.set()

  def forget(self):
    """Deletes what the last turn has left in the store, once no process waits for it any more."""
    if self.here == self.processes[0]:
      self._store.delete(self._name)

  def _wait(self, key):
    while not self._interrupted.is_set():
      text = self._store.get(key, _SECONDS)
      if text is not None:
        return text
    raise Interrupted(f"waiting for {key}")
