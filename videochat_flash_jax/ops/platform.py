"""Which kind of device the program that is being traced will run on."""

import jax


def target_platform() -> str:
  """Returns "cpu", "gpu" or "tpu": of the mesh inside `jax.shard_map`, else of the default device.

  A program can be lowered for devices that this machine does not have (`vcflash compile`), so the
  mesh is asked first.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
