import dataclasses

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from videochat_flash_jax.ops.platform import target_platform


def test_the_default_device_is_the_target_where_no_mesh_says_otherwise():
  assert target_platform() == jax.default_backend()


@pytest.mark.parametrize(
  "kind, platform", [("TPU v5 lite", "tpu"), ("NVIDIA H200", "gpu"), ("cpu", "cpu")]
)
def test_the_mesh_of_a_shard_map_is_the_target(kind, platform):
  seen = []

  def trace(x):
    seen.append(target_platform())
    return x

  fields = {"device_kind": kind, "num_cores": 1, "platform": platform}
  known = {field.name for field in dataclasses.fields(AbstractDevice)}  # of this version of jax
  device = AbstractDevice(**{name: fields[name] for name in known})
  mesh = AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=device)
  spec = PartitionSpec("x")
  jax.eval_shape(jax.shard_map(trace, mesh=mesh, in_specs=spec, out_specs=spec), jax.numpy.ones(2))
  assert set(seen) == {platform}
