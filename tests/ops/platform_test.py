import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from videochat_flash_jax.ops.platform import target_platform


def test_the_default_device_is_the_target_where_no_mesh_says_otherwise():
  assert target_platform() == jax.default_backend()


def test_the_mesh_of_a_shard_map_is_the_target():
  seen = []

  def trace(x):
    seen.append(target_platform())
    return x

  device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=device)
  spec = PartitionSpec("x")
  jax.eval_shape(jax.shard_map(trace, mesh=mesh, in_specs=spec, out_specs=spec), jax.numpy.ones(2))
  assert set(seen) == {"tpu"}
