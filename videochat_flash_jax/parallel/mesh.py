"""Devices in a grid with four named axes.

| axis       | what is split along it                                             |
|------------|--------------------------------------------------------------------|
| `data`     | rows of the batch; weights are copied                              |
| `fsdp`     | rows of the batch, and weights, which are gathered layer by layer  |
| `sequence` | the tokens of a row, and weights, as along `fsdp`                  |
| `tensor`   | heads, MLP and vocabulary                                          |

Clips are independent until they are spliced, and split along all four.
"""

import logging
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.chip_order import chip_grid
from videochat_flash_jax.parallel.mesh_config import AXES, MeshConfig, mesh_shape

_log = logging.getLogger("videochat_flash_jax")

# XLA may run collectives that do not depend on each other in another order on each CPU device: then
# they wait for each other for ever, or, being told apart by kind and size alone, take each other's
# values. The first flag fixes their order; the others keep a loop from going on beside what follows
# it. A program read back from a cache has lost that order. TPUs and GPUs fix theirs when compiling.
CPU_FLAGS = (
  "--xla_cpu_enable_concurrency_optimized_scheduler=false",
  "--xla_cpu_multi_thread_eigen=false",
  "--xla_cpu_experimental_ynn_fusion_type=",  # none
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices (all of them by default); on TPUs as they are linked, see `chip_order`.

  Several CPU devices are for tests, and need `CPU_FLAGS` in XLA_FLAGS and no cache of compiled
  programs: otherwise a warning is logged.

  Raises:
    InputError: see `mesh_shape`; there are not as many slices as the config says; or its axes do
      not fit the links.
  """
  devices = list(jax.devices() if devices is None else devices)
  if len(devices) > 1 and devices[0].platform == "cpu":
    _check_cpu_settings()
  shape = mesh_shape(config, len(devices))
  if devices[0].platform == "tpu" or config.num_slices > 1:
    grid = _grid_of_slices(config, shape, devices)
  else:
    grid = np.array(devices).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_cpu_settings():
  flags = os.environ.get("XLA_FLAGS", "").split()
  cached = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
  if cached or not set(CPU_FLAGS) <= set(flags):
    _log.warning(
      "several CPU devices give wrong numbers now and then, or stand still; start again with "
      "XLA_FLAGS holding %s, and JAX_ENABLE_COMPILATION_CACHE=false",
      " ".join(CPU_FLAGS),
    )


def _grid_of_slices(config, shape, devices):
  """One slice after another along `data`, each arranged alike."""
  _check_slices(config, devices)
  slices: dict[int, list] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  inside = (shape[0] // config.num_slices, *shape[1:])
  return np.concatenate([chip_grid(inside, slices[index]) for index in sorted(slices)])


def _check_slices(config, devices):
  """Refuses a number of slices that is not that of the devices; those of a CPU are all in one."""
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if config.num_slices != num_slices:
    raise InputError(
      f"mesh.num_slices is {config.num_slices}, but the {len(devices)} devices are in "
      f"{num_slices}: set mesh.num_slices to {num_slices}"
    )
