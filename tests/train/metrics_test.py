"""Logs: complete after a crash, with each step once; and rates of the devices."""

import contextlib
import json
import os
import resource
import struct
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import metrics
from videochat_flash_jax.train.metrics import RunLog, StepMeter


def written(workdir, step, *steps):
  with RunLog(workdir, step, num_steps=100) as log:
    for number in steps:
      log.write(number, loss=1.0 / number)


def logged(workdir, name):
  return [json.loads(line)[name] for line in (workdir / "train_log.jsonl").read_text().splitlines()]


def events(workdir):
  """All events in TensorBoard's files, in the order in which TensorBoard reads them."""
  found = []
  for path in sorted(workdir.glob("events.*")):
    content, offset = path.read_bytes(), 0
    while offset < len(content):
      (length,) = struct.unpack_from("<Q", content, offset)
      found.append(Event.FromString(content[offset + 12 : offset + 12 + length]))
      offset += 12 + length + 4
  return found


def test_a_resumed_run_appends_to_its_logs_and_removes_steps_that_are_repeated(tmp_path):
  written(tmp_path, 0, 1, 2, 3, 4)
  with (tmp_path / "train_log.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')
  written(tmp_path, 3, 4, 5)
  assert logged(tmp_path, "step") == [1, 2, 3, 4, 5]
  lines = (tmp_path / "train_log.txt").read_text().splitlines()
  assert [line.split("  ")[:2] for line in lines[:3]] == [
    ["step 1", "loss 1.0"],
    ["step 2", "loss 0.5"],
    ["step 3", "loss 0.33333"],
  ]
  assert len(lines) == 5


def test_a_directory_is_not_taken_for_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "s3:run").mkdir()
  written(Path("s3:run"), 0, 1)
  assert [event.step for event in events(tmp_path / "s3:run") if event.HasField("summary")] == [1]


def test_a_run_that_starts_again_writes_new_logs(tmp_path):
  written(tmp_path, 0, 1, 2)
  written(tmp_path, 0, 1)
  assert logged(tmp_path, "step") == [1]


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
  with RunLog(tmp_path, 0, num_steps=100) as log:
    for file in log._files:
      file.close()
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
      monkeypatch.setattr(log, "_files", [full, full])
      with pytest.raises(InputError, match=r"the log cannot be written \(No space left"):
        log.write(1, loss=1.0)


def write_on(log, fields):
  for step in range(1, 10_000):
    log.write(step, **fields)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
def test_a_disk_that_is_full_for_tensorboard_is_reported_and_does_not_block_the_run(
  tmp_path, monkeypatch
):
  """Its files are the largest; the thread that writes them ends when the disk is full."""
  fields = {f"loss_{number}": 1.0 for number in range(40)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with (
    RunLog(tmp_path, 0, num_steps=10_000) as log,
    open(os.devnull, "w") as one,
    open(os.devnull, "w") as other,
  ):
    for file in log._files:
      file.close()
    monkeypatch.setattr(log, "_files", [one, other])
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
      with pytest.raises(InputError, match=r"the log cannot be written \(File too large\)"):
        write_on(log, fields)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_numbers_in_the_log_for_programs_are_not_rounded(tmp_path):
  written(tmp_path, 0, 3)
  assert json.loads((tmp_path / "train_log.jsonl").read_text())["loss"] == 1 / 3


def test_the_time_of_a_resumed_run_continues_from_its_last_kept_step(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  for step in (0, 5):
    with RunLog(tmp_path, step, num_steps=100) as log:
      now[0] += 7
      log.write(step + 5, loss=0.0)
      now[0] += 1000
  assert logged(tmp_path, "wall_seconds") == [7.0, 14.0]


def test_tensorboard_gets_the_numbers_and_the_step_at_which_a_run_resumes(tmp_path):
  written(tmp_path, 0, 1, 2)
  time.sleep(1.0)
  with RunLog(tmp_path, 1, num_steps=100) as log:
    log.write(1, event="resume")
    log.write(2, loss=2.0)
  found = events(tmp_path)
  (start,) = [event for event in found if event.session_log.status == SessionLog.START]
  assert start.step == 2
  values = [(event.step, v.tag, v.simple_value) for event in found for v in event.summary.value]
  assert values == [(1, "loss", 1.0), (2, "loss", 0.5), (2, "loss", 2.0)]
  assert found.index(start) > [event.step for event in found].index(2)


def state(tokens, visual_tokens, broken=0):
  counts = {"tokens": tokens, "visual_tokens": visual_tokens, "places": 2 * tokens}
  counts |= {"examples": tokens // 100, "damaged": 0}
  one = counts | {"broken": {"a.jsonl": {"missing file": broken}} if broken else {}}
  return {"streams": {"0": one, "1": one}}


def test_rates_are_means_over_the_steps_since_the_last_line(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  meter = StepMeter(flops=1e12, peak=4e12, state=state(1000, 100, broken=3))
  for loss in (1.0, 3.0):
    now[0] += 2
    meter.waited(0.5)
    meter.add({"loss": loss})
  assert meter.num_steps == 2
  with meter.paused():
    now[0] += 50
  line = meter.line(state(3000, 500, broken=5))
  assert line["loss"] == 2.0 and line["seconds_per_step"] == 2.0 and line["data_wait"] == 0.25
  assert line["tokens_per_second"] == 2 * 2000 / 4
  assert line["visual_tokens_per_second"] == 2 * 400 / 4
  assert line["mfu"] == pytest.approx(2 * 1e12 / 4 / 4e12)
  assert line["examples_per_step"] == 2 * 20 / 2
  assert line["data/broken/missing file"] == 4 and line["data/broken_share"] == 0.1
  assert line["data/tokens_filled"] == 0.5 and "data/examples" not in line
  now[0] += 1
  meter.add({"loss": 5.0})
  again = meter.line(state(3000, 500, broken=5))
  assert again["loss"] == 5.0 and again["tokens_per_second"] == 0
  assert again["data/broken_share"] == 0 and "data/broken/missing file" not in again


def test_where_the_peak_is_unknown_operations_per_second_are_reported(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  meter = StepMeter(flops=3e12, peak=None, state={"next": 0})
  now[0] += 2
  meter.add({"loss": 1.0})
  line = meter.line({"next": 1})
  assert line["model_tflops"] == 1.5 and "mfu" not in line and "tokens_per_second" not in line
