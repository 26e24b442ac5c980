"""Two processes train as one does; and when one dies the other ends, and all go on together.

Each has a row of its own, or both share one row.
"""

import contextlib
import json
import signal

import numpy as np
import pytest

from tests.multidevice.two_processes_test import free_port
from tests.train.small_runs import finished, last_step, losses, records, started, stop, wait_for

OWN_ROWS = ("--config.rows=2", "--config.data.streams=2")  # each stream fills one
SHARED_ROW = ("--config.rows=1", "--config.mesh.sequence=2", "--config.sequence_parallel=ring")
NUM_STEPS = 30
HEARTBEAT = 10  # seconds after which a process without a sign of life counts as dead


def pair(rows, workdir, stack):
  """Two processes of one device each, as on two hosts."""
  coordinator = f"localhost:{free_port()}"
  several = [f"--coordinator={coordinator}", "--num-processes=2", *rows]
  several += [f"--config.heartbeat_seconds={HEARTBEAT}"]
  processes = [
    started(workdir, *several, f"--process-id={number}", num_processes=2) for number in range(2)
  ]
  return [stack.enter_context(process) for process in processes]


def end_well(processes):
  for process in processes:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    yield output + errors


def data_of(workdir):
  path = workdir / "checkpoints" / str(NUM_STEPS) / "data" / "metadata"
  return json.loads(path.read_text())


def assert_same_losses(workdir, expected):
  found = losses(workdir)
  assert [step for step, *_ in found] == [step for step, *_ in expected]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module", params=[OWN_ROWS, SHARED_ROW], ids=["own rows", "shared row"])
def rows(request):
  return request.param


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone")
  finished(workdir, *rows, num_devices=2 if rows == SHARED_ROW else 1)
  return workdir


@pytest.fixture
def stack():
  with contextlib.ExitStack() as stack:
    yield stack


@pytest.mark.slow
def test_two_processes_train_as_one_and_read_its_streams(rows, alone, tmp_path, stack):
  first, second = end_well(pair(rows, tmp_path, stack))
  assert f"step {NUM_STEPS}  " in first and "the checkpoint is in" in first
  assert f"step {NUM_STEPS}  " not in second and "the checkpoint is in" not in second
  assert_same_losses(tmp_path, losses(alone))
  assert data_of(tmp_path) == data_of(alone)
  assert set(data_of(tmp_path)["streams"]) == ({"0", "1"} if rows == OWN_ROWS else {"0"})


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_the_same_command_goes_on(
  rows, alone, tmp_path, stack, victim
):
  processes = pair(rows, tmp_path, stack)
  wait_for(lambda: last_step(tmp_path) >= 3, processes[0])
  stop(processes[victim], signal.SIGKILL)
  _, errors = processes[1 - victim].communicate(timeout=10 * HEARTBEAT)
  assert processes[1 - victim].returncode not in (0, None)
  last = errors.strip().splitlines()[-1]
  assert last.startswith(f"vcflash: process {1 - victim} of 2 ")
  assert "another process of the run has died" in last and "with the same command" in last
  assert last_step(tmp_path) < NUM_STEPS
  list(end_well(pair(rows, tmp_path, stack)))
  assert_same_losses(tmp_path, losses(alone))


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step_and_the_same_command_goes_on(
  rows, alone, tmp_path, stack
):
  processes = pair(rows, tmp_path, stack)
  wait_for(lambda: last_step(tmp_path) >= 3, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  first, _ = end_well(processes)
  assert "stopped and saved at step" in first
  stopped = last_step(tmp_path)
  assert 3 <= stopped < NUM_STEPS and (tmp_path / "checkpoints" / str(stopped)).is_dir()
  list(end_well(pair(rows, tmp_path, stack)))
  assert_same_losses(tmp_path, losses(alone))
  assert [r["event"] for r in records(tmp_path) if "event" in r] == ["start", "resume"]
