"""Exchanges what the processes of a run must agree on before they read or write checkpoints."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from videochat_flash_jax.checkpoints.runs.run_files import is_whole, whole_steps
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.agreement import allgather_text


def newest_on_all_processes(directory: Path) -> int | None:
  """Returns the step of the newest whole checkpoint that process 0 sees, or None.

  All processes must call this function.

  Args:
    directory: directory of the checkpoints.

  Raises:
    InputError: another process does not see this checkpoint.
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
  """Returns a state of the batches with the `streams` of all processes.

  All processes must call this function, each with its own state. The streams are stored by number,
  so a run with another number of processes also finds the streams that each process reads.
  """
  if jax.process_count() == 1:
    return state
  states = [json.loads(text) for text in allgather_text(json.dumps(state))]
  streams = [each["streams"] for each in states if "streams" in each]
  return states[0] | ({"streams": functools.reduce(dict.__or__, streams)} if streams else {})
