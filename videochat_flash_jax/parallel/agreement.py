"""Agreement between the processes of a run: all of them continue, or all stop with an error."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from videochat_flash_jax.errors import InputError

_MAX_BYTES = 4000  # of a text; the rest is cut off


def allgather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes.

  All processes must call this function; each waits until all have called it.

  Args:
    text: the text of this process. Only its first 4,000 bytes are sent.
  """
  if jax.process_count() == 1:
    return [text]
  buffer = np.zeros(_MAX_BYTES, np.uint8)
  encoded = np.frombuffer(text.encode()[:_MAX_BYTES], np.uint8)
  buffer[: len(encoded)] = encoded
  rows = multihost_utils.process_allgather(buffer)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


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
