"""Which kind of device the program that is being traced will run on."""

import jax


def target_platform() -> str:
  """Returns "cpu", "gpu" or "tpu".

  Inside `jax.shard_map` this is the platform of the mesh, because a program can be compiled for
  devices that this machine does not have (`vcflash compile`). Elsewhere it is that of the default
  device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  kind = device.device_kind  # such as "cpu", "TPU v5 lite", "NVIDIA H200"
  return "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"
