"""Two processes of four devices compute the step that one process computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.conftest import assert_close
from tests.multidevice.train_step_test import expected
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.processes import join_processes

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, sys, jax
from videochat_flash_jax.parallel.processes import join_processes
join_processes(sys.argv[1], 2, int(sys.argv[2]))
jax.config.update("jax_default_matmul_precision", "highest")
from tests.multidevice.train_step_test import step_on_mesh
assert jax.local_device_count() == 4 and jax.device_count() == 8
loss, weights = step_on_mesh(sys.argv[3], dropout=False)
print(json.dumps([loss, [float(abs(leaf).sum()) for leaf in jax.tree.leaves(weights)]]))
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def test_two_processes_take_the_step_of_one():
  address = f"localhost:{free_port()}"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(ROOT),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number), "fsdp 2 x sequence 2 x tensor 2"],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  outputs = [process.communicate(timeout=500) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  loss, weights = expected(dropout=False)
  sums = [float(abs(leaf).sum()) for leaf in jax.tree.leaves(weights)]
  for text, _ in outputs:
    their_loss, their_sums = json.loads(text.splitlines()[-1])
    assert_close(their_loss, loss, relative=1e-5)
    assert_close(their_sums, sums, relative=1e-6)


def test_half_told_processes_are_refused():
  with pytest.raises(InputError, match="together, or none"):
    join_processes("localhost:1", num_processes=2)
