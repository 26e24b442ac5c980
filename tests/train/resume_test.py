"""A run that was killed, or stopped by a signal, resumes to the same losses."""

import random
import signal
import time

import pytest

from tests.train.small_runs import finished, last_step, losses, records, started, stop, wait_for

pytestmark = pytest.mark.slow

NUM_STEPS = 30
# Frozen weights are written once. So the killed runs have both kinds of weights.
PARTLY_FROZEN = "--config.optimizer.scales=(('vision', 0.0), ('', 1.0))"


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("left_alone")
  finished(workdir, PARTLY_FROZEN)
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
  with started(workdir, PARTLY_FROZEN) as process:
    wait_for(lambda: last_step(workdir) >= behind and is_saving(workdir), process)
    code, _ = stop(process, signal.SIGKILL)
  return code


def test_a_run_that_is_killed_while_it_saves_resumes_exactly(undisturbed, tmp_path):
  assert kill_while_saving(tmp_path, behind=5) == -signal.SIGKILL
  finished(tmp_path, PARTLY_FROZEN)
  assert losses(tmp_path) == undisturbed
  assert [r["event"] for r in records(tmp_path) if "event" in r] == ["start", "resume"]


def test_a_signal_saves_and_ends_the_run_and_the_same_command_resumes_it(undisturbed, tmp_path):
  with started(tmp_path, PARTLY_FROZEN) as process:
    wait_for(lambda: last_step(tmp_path) >= 7, process)
    code, errors = stop(process, signal.SIGTERM)
  assert code == 0 and "stopped and saved at step" in errors
  stopped = last_step(tmp_path)
  assert 7 <= stopped < NUM_STEPS
  assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
  finished(tmp_path, PARTLY_FROZEN)
  assert losses(tmp_path) == undisturbed


@pytest.mark.parametrize(
  "number, behind",
  [
    pytest.param(signal.SIGTERM, 5, id="SIGTERM between steps"),
    pytest.param(signal.SIGINT, 0, id="SIGINT while workers begin"),
  ],
)
def test_a_signal_to_the_workers_too_ends_the_run_in_the_same_way(
  undisturbed, tmp_path, number, behind
):
  arguments = PARTLY_FROZEN, "--config.data.workers=1"
  with started(tmp_path, *arguments) as process:
    wait_for(lambda: records(tmp_path) and last_step(tmp_path) >= behind, process)
    code, errors = stop(process, number, to_group=True)
  assert code == 0 and "stopped and saved at step" in errors and "Traceback" not in errors
  stopped = last_step(tmp_path)
  assert behind <= stopped < NUM_STEPS and (tmp_path / "checkpoints" / str(stopped)).is_dir()
  assert losses(tmp_path) == undisturbed[:stopped]
  if number == signal.SIGTERM:
    finished(tmp_path, *arguments)
    assert losses(tmp_path) == undisturbed


def test_a_run_that_is_killed_at_20_random_moments_resumes_exactly(tmp_path):
  long, undisturbed = "--config.num_steps=150", tmp_path / "undisturbed"
  killed = tmp_path / "killed"
  finished(undisturbed, PARTLY_FROZEN, long)
  draw = random.Random(1)
  for moment in range(20):
    behind = last_step(killed) + draw.randrange(4)
    with started(killed, PARTLY_FROZEN, long) as process:
      # A third of the kills come while the run starts, a third while it saves.
      until = time.monotonic() + (draw.uniform(0, 10) if moment % 3 == 0 else 1000)
      wait_for(lambda: last_step(killed) > behind or time.monotonic() > until, process)  # noqa: B023
      if moment % 3 == 1:
        wait_for(lambda: is_saving(killed), process)
      code, _ = stop(process, signal.SIGKILL)
    assert code == -signal.SIGKILL
  assert 20 < last_step(killed) < 150
  finished(killed, PARTLY_FROZEN, long)
  assert losses(killed) == losses(undisturbed)


def test_a_finished_run_is_not_changed_again(left_alone):
  before = (left_alone / "train_log.jsonl").read_bytes()
  assert "finished already" in finished(left_alone, PARTLY_FROZEN)
  assert (left_alone / "train_log.jsonl").read_bytes() == before
