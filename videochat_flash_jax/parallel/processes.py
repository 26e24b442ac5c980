"""Several processes, one for each host, that compute as one.

A program that computes on several hosts calls `join_processes` before anything else asks JAX for
its devices: from then on `jax.devices()` are those of all hosts, of which `make_mesh` makes one
mesh. When one process dies the others end, too, since none can go on without it.
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

_ANOTHER_DIED = "another process of the run has died"
_GO_ON = "start all of them again with the same command, to go on from the newest checkpoint"
# What gloo, and JAX's coordination service, say of a process that is gone.
_FROM_OTHERS = re.compile("gloo|coordination", re.IGNORECASE)


def join_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 100,
):
  """Joins the processes of a run; to be called before anything is computed.

  On TPUs nothing has to be told: environment or metadata server say which hosts and slices there
  are. Elsewhere every process is told all three; one that is told nothing computes alone. JAX waits
  five minutes for processes that do not come, and then ends the program with a message of its own.

  Args:
    coordinator: "host:port" of the first process, where all others find each other.
    num_processes: how many there are.
    process_id: this one's number, from 0.
    heartbeat_seconds: after which a process that says nothing is taken for dead.

  Raises:
    InputError: only some of the three are given, or they cannot be; or JAX cannot start to join.
  """
  told = (coordinator, num_processes, process_id)
  waits = {
    "heartbeat_timeout_seconds": heartbeat_seconds,
    "shutdown_timeout_seconds": heartbeat_seconds,  # behind one that failed and left the others
  }
  if all(value is None for value in told):
    if _may_have_company():
      _join_on_tpu(waits)
    return
  if any(value is None for value in told):
    raise InputError("give coordinator, num_processes and process_id together, or none of them")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise InputError(f"coordinator is {coordinator!r}: give host:port of the first process")
  if not 0 <= process_id < num_processes:
    raise InputError(f"process_id is {process_id} of {num_processes} processes: count from 0")
  # Without a network of accelerators the CPUs talk through gloo.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, **waits)
  except (RuntimeError, ValueError, OSError) as error:
    raise InputError(
      f"process {process_id} of {num_processes} could not join at {coordinator} "
      f"({_first_line(error)}); start all of them with the same coordinator, and join first of all"
    ) from error


@contextlib.contextmanager
def ends_with_others() -> Iterator[None]:
  """Within it a process of several ends with one line on stderr, and exit code 1, if another dies.

  Mostly JAX notices first, and ends this one from C++ with many lines, of which the last are ours.
  """
  if jax.process_count() == 1:
    yield
    return
  here = f"process {jax.process_index()} of {jax.process_count()}"
  end_of_word = _leave_word(
    f"vcflash: {here} was ended: {_ANOTHER_DIED}, or this one was killed; {_GO_ON}"
  )
  try:
    yield
  except InputError:
    raise  # which is a ValueError, and may hold any word
  except (RuntimeError, ValueError) as error:
    if not is_of_others(error):
      raise
    end_of_word()
    line = f"vcflash: {here} ends, since {_ANOTHER_DIED} ({_first_line(error)}); {_GO_ON}"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)  # at an orderly exit JAX would wait for the other, and then abort


def is_of_others(error: Exception) -> bool:
  """Whether an error tells that another process of the run is gone, and nothing of this one."""
  return jax.process_count() > 1 and bool(_FROM_OTHERS.search(str(error)))


def _leave_word(line):
  """Has a line written to stderr if this process ends before it calls what this returns."""
  script = 'read ended || echo "$0" >&2'
  command = ["/bin/sh", "-c", script, line]
  shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

  def end():
    if shell.returncode is None:
      shell.communicate(b"ended\n")

  atexit.register(end)
  return end


def _may_have_company():
  """Whether there is a TPU, and its environment does not say that this host is the only one."""
  # Where JAX finds TPU chips it puts them first when it is imported, unless the user names other
  # platforms. To ask for the devices themselves would be too late to join.
  if (jax.config.jax_platforms or "").split(",")[0] != "tpu":
    return False
  if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:  # several slices
    return True
  # GKE's variables, which also tell that a host is alone. An ordinary TPU VM has none of them: it
  # has to ask its metadata server, as `jax.distributed.initialize` does.
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
  return hosts is None or "," in hosts


def _join_on_tpu(waits):
  """Leaves it to JAX to find out who is there, from environment and metadata server."""
  try:
    jax.distributed.initialize(**waits)
  except (RuntimeError, ValueError, OSError) as error:
    if isinstance(error, ValueError) and "coordinator_address" in str(error):
      return  # JAX has looked everywhere and found no cluster.
    raise InputError(
      f"this TPU host could not join those of its slice ({_first_line(error)}); join first of all, "
      "on every host; or set TPU_WORKER_HOSTNAMES=localhost if this is the only one"
    ) from error


def _first_line(error):
  return str(error).split("\n")[0]
