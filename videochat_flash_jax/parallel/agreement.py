"""Agreement between the processes of a run: all of them continue, or all stop with an error."""

import contextlib
import itertools
from collections.abc import Iterator

import jax
from jax._src import (
  distributed,  # nothing public gives the client; the same in jax 0.10.2 to 0.12.0
)

from videochat_flash_jax.errors import InputError

_CALLS = itertools.count(1)  # all processes call `allgather_text` equally often
_LONGEST_WAIT = 3_600_000  # milliseconds; where a process has died, the others end sooner


def allgather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes.

  All processes must call this function; each waits until all have called it. Texts go through the
  service that coordinates the processes. So no program is compiled, whatever the length of a text
  is, and nothing waits for the devices.
  """
  if jax.process_count() == 1:
    return [text]
  client, call, own = distributed.global_state.client, next(_CALLS), jax.process_index()
  client.key_value_set_bytes(_key(call, own), text.encode())
  texts = [
    client.blocking_key_value_get_bytes(_key(call, process), _LONGEST_WAIT).decode()
    for process in range(jax.process_count())
  ]
  # All processes have begun this call, so none of them still reads texts of the one before.
  client.key_value_delete(_key(call - 1, own))
  return texts


def _key(call, process):
  return f"videochat_flash_jax/texts/{call}/{process}"


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
