"""What the processes of a run tell each other, so that all of them go on, or none."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from videochat_flash_jax.errors import InputError

_MOST_BYTES = 4000  # of a text; the rest is cut off


def allgather_text(text: str) -> list[str]:
  """What each process says, in their order; to be called by all of them, who wait for each other.

  Args:
    text: of this process.
  """
  if jax.process_count() == 1:
    return [text]
  told = np.zeros(_MOST_BYTES, np.uint8)
  encoded = np.frombuffer(text.encode()[:_MOST_BYTES], np.uint8)
  told[: len(encoded)] = encoded
  rows = multihost_utils.process_allgather(told)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
  """What one process refuses in this block, all refuse; they leave it together.

  Raises:
    InputError: that of this process, or "process 1: " and that of the first one that has any.
  """
  own = None
  try:
    yield
  except InputError as error:
    own = error
  refusals = allgather_text(str(own or ""))
  if own is not None:
    raise own
  for number, refusal in enumerate(refusals):
    if refusal:
      raise InputError(f"process {number}: {refusal}")
