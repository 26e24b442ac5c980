"""Several processes, one for each host, that compute as one."""

import os

import jax

from videochat_flash_jax.errors import InputError

_TIMEOUT_SECONDS = 300


def join_processes(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
):
  """Joins the processes of a run; to be called before anything is computed.

  On a slice of TPUs with several hosts nothing has to be told: its environment says who is there.
  Elsewhere every process is told all three; a process alone needs none.

  Args:
    coordinator: "host:port" of the first process, where all others find each other.
    num_processes: how many there are.
    process_id: this one's number, from 0.

  Raises:
    InputError: only some of the three are given, or not all processes came in time.
  """
  told = (coordinator, num_processes, process_id)
  if all(value is None for value in told):
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
      jax.distributed.initialize()
    return
  if any(value is None for value in told):
    raise InputError("give coordinator, num_processes and process_id together, or none of them")
  # Without a network of accelerators the CPUs talk through gloo.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, initialization_timeout=_TIMEOUT_SECONDS
    )
  except RuntimeError as error:
    reason = str(error).split("\n")[0]
    raise InputError(
      f"process {process_id} of {num_processes} could not join at {coordinator} ({reason}); "
      "start all of them with the same coordinator"
    ) from error
