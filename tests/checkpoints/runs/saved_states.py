"""Small states of runs, and processes that are killed while they save them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[3]
CONFIG = {"model": "tiny", "lora": {"rank": 0, "alpha": 16.0}, "optimizer": {"name": "adamw"}}
RUN = {"config": CONFIG}
BALLAST = 3_000_000
DATA = {"streams": {"0": {"drawn": 7}}, "version": 3}


class State(NamedTuple):
  trained: dict
  optimizer: tuple


def state(value=0.0, size=4):
  weights = {"decoder": {"norm": {"scale": jnp.arange(float(size)) + value}}}
  moments = {"decoder": {"norm": {"scale": jnp.full(size, value, jnp.bfloat16)}}}
  return State(weights, ({}, moments, jnp.int32(value)))


def shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def steps(directory):
  return sorted(int(path.name) for path in directory.iterdir())


def assert_one_line(caught, *words):
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from tests.checkpoints.runs.saved_states import BALLAST, DATA, RUN, state
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
checkpoints = RunCheckpoints(Path(sys.argv[1]), keep=2)
for step in range(1, 10_000):
  checkpoints.save(step, {"state": state(step), "ballast": {"w": jnp.ones(BALLAST)}}, DATA, RUN)
"""


def killed(directory, has_come):
  """Saves a large state again and again in a process, which is killed when something has come."""
  process = subprocess.Popen(
    [sys.executable, "-c", SAVE_FOR_EVER, str(directory)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  try:
    deadline = time.monotonic() + 200
    while not has_come():
      assert process.poll() is None and time.monotonic() < deadline
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
