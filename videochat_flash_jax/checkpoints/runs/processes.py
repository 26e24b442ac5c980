"""What the processes of a run have to agree on before its checkpoints are read or written."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from videochat_flash_jax.checkpoints.runs.run_files import is_whole, whole_steps
from videochat_flash_jax.errors import InputError


def newest_on_all_processes(directory: Path) -> int | None:
  """The newest whole checkpoint as process 0 sees it, or None; every process calls this.

  Args:
    directory: of the checkpoints.

  Raises:
    InputError: another process does not see it there.
  """
  newest = max(whole_steps(directory), default=None)
  if jax.process_count() == 1:
    return newest
  with jax.transfer_guard("allow"):
    own = np.int32(-1 if newest is None else newest)
    first = int(multihost_utils.broadcast_one_to_all(own))
    sees = newest is None if first < 0 else is_whole(directory / str(first))
    all_see = multihost_utils.process_allgather(np.bool_(sees))
  if not all_see.all():
    there = "no checkpoint" if first < 0 else f"checkpoint {first}"
    raise InputError(
      f"{directory}: process 0 sees {there} there, but process {all_see.argmin()} does not; "
      "give a --workdir that all hosts share"
    )
  return None if first < 0 else first


def allgather_streams(state: dict) -> dict:
  """A state of batches with the `streams` of all processes, each of which calls this with its own.

  Any process, of any number of them, finds those that it reads under their names.
  """
  if jax.process_count() == 1:
    return state
  text = np.frombuffer(json.dumps(state).encode(), np.uint8)
  with jax.transfer_guard("allow"):
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, max(lengths) - len(text)))
    texts = multihost_utils.process_allgather(padded)
  states = [json.loads(bytes(text[:size])) for text, size in zip(texts, lengths, strict=True)]
  streams = [one["streams"] for one in states if "streams" in one]
  return states[0] | ({"streams": functools.reduce(dict.__or__, streams)} if streams else {})
