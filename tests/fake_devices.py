"""Several devices of one CPU, for processes that tests start."""

import os

from videochat_flash_jax.parallel.mesh import CPU_FLAGS


def fake_devices(number: int, num_processes: int = 1) -> dict[str, str]:
  """Environment of one of the processes that compute together, each with so many devices."""
  own = os.environ.get("XLA_FLAGS", "")  # the last of a kind counts
  flags = f"{own} --xla_force_host_platform_device_count={number}"
  if number * num_processes == 1:
    return {"XLA_FLAGS": flags}
  return {
    "XLA_FLAGS": f"{flags} {' '.join(CPU_FLAGS)}",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
