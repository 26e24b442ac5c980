"""A checkpoint is gone on from on another mesh, and by another number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.multidevice.two_processes_test import free_port
from videochat_flash_jax.checkpoints.manager import RunCheckpoints
from videochat_flash_jax.parallel.mesh import MeshConfig, make_mesh
from videochat_flash_jax.parallel.sharding import weight_shardings

ROOT = Path(__file__).parents[2]
VALUES = {
  "trained": {"decoder": {"layers": {"stacked": {"q_proj": {"kernel": np.ones((2, 16, 8)) * 3}}}}},
  "frozen": {"decoder": {"norm": {"scale": np.arange(5.0)}}},
}
PROCESS = """
import sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
address, number, directory = sys.argv[1:]
join_processes(address, 2, int(number))
from tests.multidevice.run_checkpoints_test import go_on
go_on(Path(directory), int(number))
"""


def shapes(devices):
  mesh = make_mesh(MeshConfig(tensor=1 if len(devices) == 1 else 2), devices)
  shardings = weight_shardings(mesh, VALUES)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=sharding),
    VALUES,
    shardings,
  )


def place(values, shapes):
  return jax.tree.map(
    lambda x, shape: jax.make_array_from_callback(
      shape.shape, shape.sharding, lambda index: x[index].astype(np.float32)
    ),
    values,
    shapes,
  )


def go_on(directory, number):
  """One of two processes: goes on from what one had saved, and saves what both have read."""
  wanted = shapes(jax.devices())
  with RunCheckpoints(directory) as checkpoints:
    restored = checkpoints.restore(wanted)
    assert restored.data["streams"] == {"0": {"drawn": 1}, "1": {"drawn": 2}}
    own = {"version": 3, "streams": {str(number): {"drawn": 10 * "x" * (number + 1)}}}
    doubled = jax.jit(lambda state: jax.tree.map(lambda x: 2 * x, state))(restored.state)
    checkpoints.save(restored.step + 1, doubled, own, {"config": {}})


def assert_holds(state, factor):
  for array, values in zip(jax.tree.leaves(state), jax.tree.leaves(VALUES), strict=True):
    np.testing.assert_array_equal(array, factor * values)


@pytest.mark.parametrize("number", [1, 4, 8])
def test_a_checkpoint_of_eight_devices_is_restored_on_any_number(tmp_path, number):
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, place(VALUES, shapes(jax.devices())), {"streams": {}}, {"config": {}})
    wanted = shapes(jax.devices()[:number])
    restored = checkpoints.restore(wanted)
  assert_holds(restored.state, 1)
  for array, shape in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
    assert array.sharding == shape.sharding


def test_two_processes_go_on_from_one_and_one_from_two(tmp_path):
  streams = {"streams": {"0": {"drawn": 1}, "1": {"drawn": 2}}}
  wanted = shapes(jax.devices()[:1])
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, place(VALUES, wanted), streams, {"config": {}})
  address = f"localhost:{free_port()}"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(ROOT),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number), str(tmp_path)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  outputs = [process.communicate(timeout=200) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  with RunCheckpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(wanted)
  assert restored.step == 2
  assert_holds(restored.state, 2)
  read = {"0": {"drawn": "x" * 10}, "1": {"drawn": "x" * 20}}
  assert restored.data == {"version": 3, "streams": read}
