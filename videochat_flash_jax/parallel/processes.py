"""Starts and ends a run that has several processes, one on each host.

A program that runs on several hosts calls `join_processes` before anything else asks JAX for its
devices. From then on `jax.devices()` lists the devices of all hosts, and `make_mesh` makes one mesh
of them. If one process dies, the others end too, since they cannot continue without it.
"""

import atexit
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import jax

from videochat_flash_jax.errors import InputError

_PEER_DIED = "another process of the run has died"
_REMEDY = "start all processes again with the same command, to continue from the newest checkpoint"
# Words in the errors of gloo and of JAX's coordination service after another process has died.
_PEER_FAILURE = re.compile("gloo|coordination", re.IGNORECASE)


def join_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 100,
):
  """Joins this process to the other processes of the run.

  It must be called before anything is computed. On TPUs no argument is needed: the environment or
  the metadata server lists all hosts and slices. On other devices give the first three arguments in
  every process; a process without them computes alone. JAX waits five minutes for missing
  processes, and then ends the program with its own message.

  Args:
    coordinator: "host:port" of the first process; all processes connect to it.
    num_processes: the number of processes.
    process_id: the number of this process, counted from 0.
    heartbeat_seconds: a process that sends no sign of life for so long is taken for dead.

  Raises:
    InputError: only some of the first three arguments are given, one is not valid, or JAX cannot
      join the processes.
  """
  given = (coordinator, num_processes, process_id)
  waits = {
    "heartbeat_timeout_seconds": heartbeat_seconds,
    # At its end a process waits so long for others that may have failed.
    "shutdown_timeout_seconds": heartbeat_seconds,
  }
  if all(value is None for value in given):
    if _may_have_peers():
      _join_on_tpu(waits)
    return
  if any(value is None for value in given):
    raise InputError("give coordinator, num_processes and process_id together, or none of them")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise InputError(f"coordinator is {coordinator!r:.80}: give host:port of the first process")
  if not 0 <= process_id < num_processes:
    raise InputError(f"process_id is {process_id} of {num_processes} processes: count from 0")
  # Where no accelerators are linked, the processes communicate through gloo on the CPU.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, **waits)
  except (RuntimeError, ValueError, OSError) as error:
    raise InputError(
      f"process {process_id} of {num_processes} could not join at {coordinator} "
      f"({_first_line(error)}); start all processes with the same coordinator, and join before "
      "anything else"
    ) from error


@contextlib.contextmanager
def exit_if_peer_fails() -> Iterator[None]:
  """If another process dies while this block runs, this process ends too.

  It prints one line on stderr and ends with exit code 1. Often JAX notices the death first: then
  its C++ code prints many lines and ends the process, and our line is printed last.
  """
  if jax.process_count() == 1:
    yield
    return
  here = f"process {jax.process_index()} of {jax.process_count()}"
  cancel = _print_if_killed(
    f"vcflash: {here} was ended: {_PEER_DIED}, or this one was killed; {_REMEDY}"
  )
  try:
    yield
  except InputError:
    raise  # it is a ValueError whose text may contain the words of _PEER_FAILURE
  except (RuntimeError, ValueError) as error:
    if not is_peer_failure(error):
      raise
    cancel()
    line = f"vcflash: {here} ends because {_PEER_DIED} ({_first_line(error)}); {_REMEDY}"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)  # a normal exit would let JAX wait for the dead process, and then abort


def is_peer_failure(error: Exception) -> bool:
  """Whether an error was caused by the death of another process, not by this process."""
  return jax.process_count() > 1 and bool(_PEER_FAILURE.search(str(error)))


def _print_if_killed(line):
  """Starts a shell that prints `line` on stderr if this process ends without a normal exit.

  Returns a function that cancels this.
  """
  script = 'read ended || echo "$0" >&2'
  command = ["/bin/sh", "-c", script, line]
  shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

  def cancel():
    """Ends the shell without printing."""
    if shell.returncode is None:
      shell.communicate(b"ended\n")

  atexit.register(cancel)
  return cancel


def _may_have_peers():
  """Whether there is a TPU, and its environment does not say that this host is the only one."""
  # When JAX is imported and finds TPU chips, it puts "tpu" first in `jax_platforms`, unless the
  # user has named other platforms. We cannot ask for the devices: after that no process can join.
  if (jax.config.jax_platforms or "").split(",")[0] != "tpu":
    return False
  if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:  # several slices
    return True
  # GKE sets these variables, also for a host that is alone. An ordinary TPU VM has none of them: it
  # must ask its metadata server, as `jax.distributed.initialize` does.
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
  return hosts is None or "," in hosts


def _join_on_tpu(waits):
  """Joins on TPUs: JAX finds the other hosts from the environment or the metadata server."""
  try:
    jax.distributed.initialize(**waits)
  except (RuntimeError, ValueError, OSError) as error:
    if isinstance(error, ValueError) and "coordinator_address" in str(error):
      return  # JAX has searched everywhere and found no cluster
    raise InputError(
      f"this TPU host could not join the hosts of its slice ({_first_line(error)}); join before "
      "anything else, on every host; or set TPU_WORKER_HOSTNAMES=localhost if there is no other"
    ) from error


def _first_line(error):
  return str(error).split("\n")[0]
