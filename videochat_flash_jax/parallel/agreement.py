"""Agreement between the processes of a run: all of them continue, or all stop with an error."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from videochat_flash_jax.errors import InputError


def allgather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes.

  All processes must call this function; each waits until all have called it.
  """
  if jax.process_count() == 1:
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  with jax.transfer_guard("allow"):
    sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
    padded = np.pad(encoded, (0, max(*sizes, 1) - len(encoded)))
    rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


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
