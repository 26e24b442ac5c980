"""What a run does between its steps: when it stops, what it logs then, and what it waits for."""

import contextlib
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from tests.train import small_config
from tests.train.small_runs import records
from videochat_flash_jax.train import loop, run
from videochat_flash_jax.train.batches import held_out_batches, run_batches
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.preemption import Preemption
from videochat_flash_jax.train.program import train_program


def small(**changes):
  config = small_config.get_config()
  changes = {"eval__every": 100, "checkpoint__every": 100} | changes
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


def signal_behind(monkeypatch, holder, name):
  """Sends SIGTERM to this process at the end of a function."""
  function = getattr(holder, name)

  def then_signal(*args, **kwargs):
    result = function(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
    return result

  monkeypatch.setattr(holder, name, then_signal)


def lines(workdir):
  return [record["step"] for record in records(workdir) if "loss" in record]


@pytest.mark.slow
def test_a_run_that_stops_between_two_lines_logs_the_steps_since_the_last_one(
  tmp_path, monkeypatch
):
  config, asked = small(num_steps=6, log_every=4), []

  def is_due(_):
    asked.append(None)
    return len(asked) >= 3

  with monkeypatch.context() as patched:
    patched.setattr(Preemption, "is_due", is_due)
    assert loop.train(config, tmp_path) is None
  assert lines(tmp_path) == [3] and (tmp_path / "checkpoints" / "3").is_dir()
  start = records(tmp_path)[0]
  assert start["event"] == "start" and start["compile_seconds"] > 0
  assert loop.train(config, tmp_path) == tmp_path
  assert lines(tmp_path) == [3, 4, 6]


@pytest.mark.slow
def test_a_signal_during_an_evaluation_ends_the_run_right_after_it(tmp_path, monkeypatch):
  signal_behind(monkeypatch, run._Steps, "_evaluate")
  assert loop.train(small(num_steps=4, eval__every=2), tmp_path) is None
  assert lines(tmp_path) == [1, 2] and (tmp_path / "checkpoints" / "2").is_dir()
  assert "eval/loss" in records(tmp_path)[-1]


def test_a_signal_at_the_end_of_a_stage_ends_the_program_before_the_next_stage(
  tmp_path, monkeypatch
):
  begun = []
  monkeypatch.setattr(loop, "train_run", lambda settings, *_: begun.append(settings) or True)
  signal_behind(monkeypatch, loop, "train_run")
  config = type(small())({"stages": {"first": small(), "second": small()}})
  assert loop.train(config, tmp_path) is None and len(begun) == 1


class Slow:
  """Batches that take some seconds each."""

  def __init__(self, batches, seconds):
    self._batches, self._seconds = batches, seconds

  def __next__(self):
    time.sleep(self._seconds)
    return next(self._batches)

  def __getattr__(self, name):
    return getattr(self._batches, name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "of_step, of_wait, least, most", [(0.0, 0.4, 0.6, 1.0), (0.8, 0.4, 0, 0.2)]
)
def test_data_wait_counts_only_the_time_with_idle_devices(
  tmp_path, monkeypatch, of_step, of_wait, least, most
):
  begin, fetched = run.RunBatches.begin, run._fetched

  def slow_step(metrics):
    time.sleep(of_step)
    return fetched(metrics)

  monkeypatch.setattr(run.RunBatches, "begin", lambda self: Slow(begin(self), of_wait))
  monkeypatch.setattr(run, "_fetched", slow_step)
  config = small(num_steps=4, log_every=1)
  loop.train(config, tmp_path)
  (line,) = [record for record in records(tmp_path) if record["step"] == 3 and "loss" in record]
  assert least <= line["data_wait"] <= most
  assert line["seconds_per_step"] >= max(of_step, of_wait) * 0.9


def test_held_out_examples_do_not_depend_on_the_number_of_hosts(tmp_path):
  """Training has a stream for each host, and held-out batches have one for each row."""

  def first_batch(streams):
    config = small(rows=2, data__streams=streams)
    settings = train_settings(config)
    program = train_program(settings, jax.devices())
    loop.prepare(tmp_path, settings, json.loads(config.to_json_best_effort()))
    read = []
    for batches in (run_batches, held_out_batches):
      with contextlib.closing(batches(settings, program, tmp_path / "hub").begin()) as iterator:
        read.append(np.asarray(next(iterator)["token_ids"]))
    return read

  (trained, held_out), (others, the_same) = first_batch(1), first_batch(2)
  np.testing.assert_array_equal(the_same, held_out)
  assert (others != trained).any() and (held_out != trained).any()
