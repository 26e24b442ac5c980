"""Frozen weights are written once a run, whole or not at all, and every checkpoint finds them."""

import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.checkpoints.runs.saved_states import (
  DATA,
  ROOT,
  RUN,
  assert_one_line,
  shapes_of,
  state,
)
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError

FROZEN = np.random.default_rng(0).normal(size=(100, 300)).astype(np.float32)


def partly_frozen(value):
  return {
    "trained": {"scale": jnp.full(4, float(value))},
    "frozen": {"kernel": jnp.asarray(FROZEN)},
  }


def restored(directory):
  with RunCheckpoints(directory) as checkpoints:
    return checkpoints.restore(shapes_of(partly_frozen(0)))


def names_in(checkpoint):
  return set(ocp.StandardCheckpointHandler().metadata(checkpoint / "state"))


def size_of(directory):
  return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def files_of(directory):
  return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_frozen_weights_are_written_once_and_are_in_no_checkpoint(tmp_path):
  with RunCheckpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, partly_frozen(1), DATA, RUN)
    checkpoints.wait()
    written = files_of(tmp_path / "frozen")
    checkpoints.save(2, partly_frozen(2), DATA, RUN)
  with RunCheckpoints(tmp_path, keep=1) as checkpoints:
    state = checkpoints.restore(shapes_of(partly_frozen(0))).state
    checkpoints.save(3, state, DATA, RUN)
  assert {path.name for path in tmp_path.iterdir()} == {"3", "frozen"}
  assert files_of(tmp_path / "frozen") == written
  assert names_in(tmp_path / "3") == {"trained.scale"}
  assert names_in(tmp_path / "frozen") == {"frozen.kernel"}
  assert size_of(tmp_path / "3") < 20_000 < FROZEN.nbytes / 2 < size_of(tmp_path / "frozen")
  found = restored(tmp_path)
  assert found.step == 3
  np.testing.assert_array_equal(found.state["frozen"]["kernel"], FROZEN)
  np.testing.assert_array_equal(found.state["trained"]["scale"], np.full(4, 2.0))


def test_where_nothing_is_frozen_nothing_is_written_beside_the_checkpoints(tmp_path):
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state(), DATA, RUN)
  assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_frozen_weights_of_a_beginning_without_a_checkpoint_are_written_anew(tmp_path):
  other = partly_frozen(1)
  other["frozen"]["kernel"] = -FROZEN
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, other, DATA, RUN)
  shutil.rmtree(tmp_path / "1")
  with RunCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(shapes_of(partly_frozen(0))) is None
    checkpoints.save(1, partly_frozen(1), DATA, RUN)
  np.testing.assert_array_equal(restored(tmp_path).state["frozen"]["kernel"], FROZEN)


def test_frozen_weights_that_are_missing_or_damaged_are_reported_with_their_directory(tmp_path):
  with RunCheckpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(1, partly_frozen(1), DATA, RUN)
  frozen = tmp_path / "run" / "frozen"
  frozen.rename(tmp_path / "away")
  with pytest.raises(InputError) as caught:
    restored(tmp_path / "run")
  assert_one_line(caught, str(tmp_path / "run" / "1"), str(frozen), "missing", "copy")
  (tmp_path / "away").rename(frozen)
  for path in (frozen / "state").rglob("d/*"):
    path.unlink()
  with pytest.raises(InputError) as caught:
    restored(tmp_path / "run")
  assert_one_line(caught, str(frozen), "damaged", "a copy of them", "another --workdir")


KILLED_BEFORE_IT_RENAMES = """
import os, signal, sys
from pathlib import Path
import jax.numpy as jnp
import orbax.checkpoint as ocp
from tests.checkpoints.runs.saved_states import DATA, RUN, state
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
ocp.CompositeCheckpointHandler.finalize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saved = {"state": state(1.0), "frozen": {"w": jnp.ones(5)}}
RunCheckpoints(Path(sys.argv[1])).save(1, saved, DATA, RUN)
"""


def test_frozen_weights_that_a_kill_leaves_half_written_are_written_again(tmp_path):
  unfinished = tmp_path / "frozen.orbax-checkpoint-tmp"
  process = subprocess.run(
    [sys.executable, "-c", KILLED_BEFORE_IT_RENAMES, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert process.returncode == -signal.SIGKILL
  assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
  saved = {"state": state(1.0), "frozen": {"w": jnp.full(5, 2.0)}}
  with RunCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(shapes_of(saved)) is None
    checkpoints.save(1, saved, DATA, RUN)
    found = checkpoints.restore(shapes_of(saved)).state
  np.testing.assert_array_equal(found["frozen"]["w"], saved["frozen"]["w"])
  assert not unfinished.exists()
