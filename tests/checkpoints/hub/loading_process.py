"""Loads a checkpoint in a process of its own and prints what that took of the host's memory.

  python -m tests.checkpoints.hub.loading_process DIRECTORY [int8]

On the CPU the arrays themselves lie in the host's memory, so their bytes are taken off.
"""

import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.checkpoints.small_checkpoints import make_model
from videochat_flash_jax.checkpoints.convert import flat_weights, load_model


def peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shards_differ(directory: Path, whole: dict[str, jax.Array]) -> list[str]:
  """Paths whose shards, loaded onto all devices, are not the slices of the whole array."""
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))

  def sharding_of(path, shape):
    if not path.endswith(("kernel", "embedding")):
      return NamedSharding(mesh, PartitionSpec())
    spec = (None, "fsdp") if "stacked" in path else ("fsdp",)
    return NamedSharding(mesh, PartitionSpec(*spec))

  model = load_model(make_model, directory, jnp.bfloat16, sharding_of)
  differ = []
  for path, array in flat_weights(nnx.state(model)):
    right = array.sharding.is_equivalent_to(sharding_of(path, array.shape), array.ndim) and all(
      np.array_equal(shard.data, whole[path][shard.index]) for shard in array.addressable_shards
    )
    differ += [] if right else [path]
  return differ


def main(directory: Path, weights: str | None = None):
  jnp.zeros(1).block_until_ready()
  before = peak_bytes()
  model = load_model(make_model, directory, jnp.bfloat16, weights=weights)
  whole = dict(flat_weights(nnx.state(model)))
  taken = peak_bytes() - before - sum(array.nbytes for array in whole.values())
  report = {"host_bytes": taken, "differ": []}
  if jax.device_count() > 1:
    report["differ"] = shards_differ(directory, whole)
  print(json.dumps(report))


main(Path(sys.argv[1]), *sys.argv[2:])
