"""Agreement between the processes of a run: all of them continue, or all stop with an error."""

import contextlib
import functools
from collections.abc import Iterator

import jax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.exchange import CoordinationStore, Exchange


@functools.cache
def exchange_of_all() -> Exchange:
  """Returns the exchange of all processes of the run, which the main thread uses."""
  return Exchange("all", range(jax.process_count()), jax.process_index(), CoordinationStore())


def allgather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes.

  All processes must call this function; each waits until all have called it. No program is
  compiled for it, whatever the length of a text is, and nothing waits for the devices.
  """
  return [text] if jax.process_count() == 1 else exchange_of_all().tell(text)


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """If one process raises an `InputError` in this block, all processes raise one.

  All processes must enter the block; at its end each waits for the others.

  Raises:
    InputError: the error of this process, if it has one. Otherwise the error of the first process
      that has one, with "process 1: " before it.
  """
  own_error = None
  try:
    yield
  except InputError as error:
    own_error = error
  messages = allgather_text(str(own_error or ""))
  if own_error is not None:
    raise own_error
  for process, message in enumerate(messages):
    if message:
      raise InputError(f"process {process}: {message}")
