"""A run that was killed, or stopped by a signal, goes on as if nothing had been."""

import random
import signal

import pytest

from tests.train.small_runs import finished, last_step, losses, records, started, stop, wait_for

NUM_STEPS = 30


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("left_alone")
  finished(workdir)
  return workdir


@pytest.fixture(scope="module")
def undisturbed(left_alone):
  found = losses(left_alone)
  assert [step for step, *_ in found] == list(range(1, NUM_STEPS + 1))
  assert found[-1][1] < 0.95 * found[0][1]
  return found


def is_saving(workdir):
  return any(workdir.glob("checkpoints/*tmp*"))


def kill_while_saving(workdir, behind):
  with started(workdir) as process:
    wait_for(lambda: last_step(workdir) >= behind and is_saving(workdir), process)
    code, _ = stop(process, signal.SIGKILL)
  return code


def test_a_run_that_is_killed_while_it_saves_goes_on_exactly(undisturbed, tmp_path):
  assert kill_while_saving(tmp_path, behind=5) == -signal.SIGKILL
  finished(tmp_path)
  assert losses(tmp_path) == undisturbed
  assert [r["event"] for r in records(tmp_path) if "event" in r] == ["start", "resume"]


def test_a_signal_saves_and_ends_the_run_well_and_the_same_command_goes_on(undisturbed, tmp_path):
  with started(tmp_path) as process:
    wait_for(lambda: last_step(tmp_path) >= 7, process)
    code, errors = stop(process, signal.SIGTERM)
  assert code == 0 and "stopped and saved at step" in errors
  stopped = last_step(tmp_path)
  assert 7 <= stopped < NUM_STEPS
  assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
  finished(tmp_path)
  assert losses(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_run_that_is_killed_at_20_random_moments_goes_on_exactly(undisturbed, tmp_path):
  draw = random.Random(1)
  for moment in range(20):
    behind = last_step(tmp_path) + draw.randrange(4)
    with started(tmp_path) as process:
      wait_for(lambda: last_step(tmp_path) > behind, process)  # noqa: B023
      if moment % 2:
        wait_for(lambda: is_saving(tmp_path), process)
      stop(process, signal.SIGKILL)
  finished(tmp_path)
  assert losses(tmp_path) == undisturbed


def test_a_finished_run_is_not_touched_again(left_alone):
  before = (left_alone / "train_log.jsonl").read_bytes()
  assert "finished before" in finished(left_alone)
  assert (left_alone / "train_log.jsonl").read_bytes() == before
