"""A checkpoint is gone on from on another mesh, and by another number of processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.fake_devices import fake_devices
from tests.multidevice.two_processes_test import free_port
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
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
from tests.multidevice import run_checkpoints_test as test
test.go_on(Path(directory) / "shared", int(number))
test.begin(Path(directory) / "begun")
test.see_different_directories(Path(directory) / f"of_{number}")
"""
ONE = {"streams": {"0": {"drawn": 1}, "1": {"drawn": 2}}}


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
    assert restored.data == ONE
    own = {"version": 3, "streams": {str(number): {"drawn": 10 * "x" * (number + 1)}}}
    double = jax.jit(lambda weights: jax.tree.map(lambda x: 2 * x, weights))
    state = restored.state | {"trained": double(restored.state["trained"])}
    checkpoints.save(restored.step + 1, state, own, {"config": {}})


def begin(directory):
  """One of two processes: begins a run, with weights that never change."""
  with RunCheckpoints(directory) as checkpoints:
    assert checkpoints.restore(shapes(jax.devices())) is None
    for step in (1, 2):
      checkpoints.save(step, place(VALUES, shapes(jax.devices())), {}, {"config": {}})


def see_different_directories(directory):
  """One of two processes: there is a checkpoint in the directory of the first alone."""
  with RunCheckpoints(directory) as checkpoints, pytest.raises(InputError) as caught:
    checkpoints.restore(shapes(jax.devices()))
  (directory / "said").write_text(str(caught.value))


def assert_holds(state, factor):
  trained, frozen = (jax.tree.leaves(state[part]) for part in ("trained", "frozen"))
  np.testing.assert_array_equal(trained[0], factor * jax.tree.leaves(VALUES["trained"])[0])
  np.testing.assert_array_equal(frozen[0], np.arange(5.0))


@pytest.mark.parametrize("number", [1, 4, 8])
def test_a_checkpoint_of_eight_devices_is_restored_on_any_number(tmp_path, number):
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, place(VALUES, shapes(jax.devices())), {"streams": {}}, {"config": {}})
    wanted = shapes(jax.devices()[:number])
    restored = checkpoints.restore(wanted)
  assert_holds(restored.state, 1)
  for array, shape in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
    assert array.sharding == shape.sharding


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  """Where two processes went on from what one had saved, began, and saw different directories."""
  directory = tmp_path_factory.mktemp("two_processes")
  with RunCheckpoints(directory / "shared") as checkpoints:
    checkpoints.save(1, place(VALUES, shapes(jax.devices()[:1])), ONE, {"config": {}})
  shutil.copytree(directory / "shared", directory / "of_0")
  address = f"localhost:{free_port()}"
  environment = os.environ | {
    **fake_devices(4, num_processes=2),
    "PYTHONPATH": str(ROOT),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number), str(directory)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  outputs = [process.communicate(timeout=200) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return directory


def restored_by_one(directory):
  with RunCheckpoints(directory) as checkpoints:
    return checkpoints.restore(shapes(jax.devices()[:1]))


def test_two_processes_go_on_from_one_and_one_from_two(two_processes):
  restored = restored_by_one(two_processes / "shared")
  assert restored.step == 2
  assert_holds(restored.state, 2)
  read = {"0": {"drawn": "x" * 10}, "1": {"drawn": "x" * 20}}
  assert restored.data == {"version": 3, "streams": read}


def test_two_processes_write_what_is_frozen_once(two_processes):
  restored = restored_by_one(two_processes / "begun")
  assert restored.step == 2
  assert_holds(restored.state, 1)
  names = {path.name for path in (two_processes / "begun").iterdir()}
  assert names == {"1", "2", "frozen"}


def test_a_directory_that_is_not_shared_is_told_to_every_process(two_processes):
  for number in range(2):
    said = (two_processes / f"of_{number}" / "said").read_text()
    assert "process 0 sees checkpoint 1 there, but process 1 does not" in said
    assert "a --workdir that all hosts share" in said and "\n" not in said
