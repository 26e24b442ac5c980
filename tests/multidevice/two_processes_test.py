"""Two processes of four devices compute the step that one process computes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.fake_devices import fake_devices
from tests.multidevice.train_step_test import assert_same, expected

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys, jax, numpy
from videochat_flash_jax.parallel.processes import join_processes
address, number, path, name, dropout = sys.argv[1:]
join_processes(address, 2, int(number))
jax.config.update("jax_default_matmul_precision", "highest")
from tests.multidevice.train_step_test import step_on_mesh
assert jax.local_device_count() == 4 and jax.device_count() == 8
numpy.savez(path, *jax.tree.leaves(step_on_mesh(name, dropout == "True")))
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def run_two(program, paths, *arguments):
  """Runs a program in two processes of four devices, each with a path of its own.

  Its arguments are the address of the first process, its number, its path, and the others.
  """
  address = f"localhost:{free_port()}"
  environment = os.environ | {**fake_devices(4, num_processes=2), "PYTHONPATH": str(ROOT)}
  logs = [path.with_suffix(".log") for path in paths]  # no pipes: a full one would stop a process
  processes = []
  for number, (path, log) in enumerate(zip(paths, logs, strict=True)):
    command = [sys.executable, "-c", program, address, number, path, *arguments]
    with log.open("w") as output:
      processes.append(
        subprocess.Popen(map(str, command), env=environment, stdout=output, stderr=output)
      )
  try:
    codes = [process.wait(timeout=500) for process in processes]
  finally:
    for process in processes:
      process.kill()  # one that waits for another that failed; nothing, if it has ended
  assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, dropout",
  [
    pytest.param("fsdp 2 x sequence 2 x tensor 2", False, id="gradients are summed over both"),
    pytest.param("sequence 8", True, id="rows lie on both"),
  ],
)
def test_two_processes_take_the_step_of_one(tmp_path, name, dropout):
  paths = [tmp_path / f"{number}.npz" for number in range(2)]
  run_two(PROCESS, paths, name, dropout)
  of_one = expected(dropout)
  for path in paths:
    with np.load(path) as saved:
      assert_same(jax.tree.unflatten(jax.tree.structure(of_one), list(saved.values())), of_one)
