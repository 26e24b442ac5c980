"""Builds the mesh: all devices in a grid with four named axes.

| axis       | what is sharded over it                                            |
|------------|--------------------------------------------------------------------|
| `data`     | rows of the batch; weights are replicated                          |
| `fsdp`     | rows of the batch, and weights, which are gathered layer by layer  |
| `sequence` | the tokens of a row, and weights, as over `fsdp`                   |
| `tensor`   | heads, MLP and vocabulary                                          |

Clips do not depend on each other until they are spliced into the text, so they are sharded over all
four axes.
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

# If two collectives do not depend on each other, XLA may run them in a different order on each CPU
# device. Then they wait for each other for ever, or they exchange their values, because XLA on the
# CPU knows collectives only by kind and size. The first flag fixes the order of collectives; the
# others keep XLA from running a loop at the same time as the operations after it. A program that
# comes from the compilation cache has lost this order. On TPUs and GPUs the compiler fixes it.
CPU_FLAGS = (
  "--xla_cpu_enable_concurrency_optimized_scheduler=false",
  "--xla_cpu_multi_thread_eigen=false",
  "--xla_cpu_experimental_ynn_fusion_type=",  # none
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices in a mesh; on TPUs neighbours in the mesh are linked, see `chip_order`.

  Several CPU devices are for tests. They need `CPU_FLAGS` in XLA_FLAGS, and no compilation cache;
  without these settings a warning is logged.

  Args:
    config: sizes of the axes.
    devices: all devices by default.

  Raises:
    InputError: the sizes do not fit the number of devices (see `mesh_shape`), the number of slices
      is not the one in the config, or the axes do not fit the links between the chips.
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
      "several CPU devices sometimes compute wrong numbers or wait for ever; to prevent this, "
      "start again with %s in XLA_FLAGS, and with JAX_ENABLE_COMPILATION_CACHE=false",
      " ".join(CPU_FLAGS),
    )


def _grid_of_slices(config, shape, devices):
  """Places the slices one behind another along `data`; all slices have the same order inside."""
  _check_slices(config, devices)
  slices: dict[int, list] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  inside = (shape[0] // config.num_slices, *shape[1:])
  return np.concatenate([chip_grid(inside, slices[index]) for index in sorted(slices)])


def _check_slices(config, devices):
  """Raises an error unless the config has the true number of slices; CPU devices are one slice."""
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if config.num_slices != num_slices:
    raise InputError(
      f"mesh.num_slices is {config.num_slices}, but the {len(devices)} devices are in "
      f"{num_slices}: set mesh.num_slices to {num_slices}"
    )
