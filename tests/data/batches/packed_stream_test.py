"""Streams go on where they were, whatever happens to media, workers or the program meanwhile."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.batches.saved_batches import digest
from tests.data.batches.small_mixture import (
  assert_tells_its_own_error_alone,
  config,
  make_tokenizer,
  read_rows,
  write_mixture,
)
from videochat_flash_jax.data.batches import train_batches
from videochat_flash_jax.data.batches.row_packer import RowPacker
from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def changing(tmp_path):
  """A mixture's folder, its rows, and a folder to which half of its videos have gone."""
  mixture, away = write_mixture(tmp_path), tmp_path / "away"
  away.mkdir()
  for number in range(6, 12):
    shutil.move(tmp_path / f"{number}.mp4", away)
  return tmp_path, read_rows(mixture), away


def unfinished(state):
  """Number and source row of all examples in rows that are not full."""
  return [pair for row in state["streams"]["0"]["unfinished"] for pair in row]


def test_videos_that_are_mended_meanwhile_do_not_change_rows_that_were_begun(changing, monkeypatch):
  folder, rows, away = changing
  batches = iter(mixture_batches(config(rows=1, max_broken_share=1.0), rows, make_tokenizer))
  given, write_row, states, num_begun = {}, train_batches.write_row, [], 0

  def spy(packed, *args):
    nonlocal num_begun
    for item in packed:
      if item.number in begun:
        num_begun += 1
        assert item.source_row == begun[item.number]
        for ours, before in zip(item.example, given[item.number].example, strict=True):
          np.testing.assert_array_equal(ours, before)
      given.setdefault(item.number, item)
    write_row(packed, *args)

  monkeypatch.setattr(train_batches, "write_row", spy)
  begun = {}
  for _ in range(16):
    states.append(json.loads(json.dumps(batches.get_state())))
    next(batches)
  for video in away.iterdir():
    shutil.move(video, folder)
  for state in states[:8]:
    batches.set_state(state)
    begun = {number: row for number, row in unfinished(state) if number in given}
    next(batches)
  assert num_begun > 8


def test_videos_that_are_gone_meanwhile_are_named(changing):
  folder, rows, _ = changing
  batches = iter(mixture_batches(config(rows=1, max_broken_share=1.0), rows, make_tokenizer))
  for _ in range(4):
    next(batches)
  state = batches.get_state()
  for file in (*folder.glob("*.mp4"), *folder.glob("*.png")):
    file.unlink()
  batches.set_state(state)
  labels = [rows.label(row) for _, row in unfinished(state) if rows.kind(row) != "text"]
  said = f", ({'|'.join(labels)}) was read before the run was saved, .* now: missing file"
  with pytest.raises(InputError, match=said) as error:
    next(batches)
  assert labels and "\n" not in str(error.value) and batches.get_state() == state


def test_after_an_error_the_state_is_that_behind_the_last_batch(mixture, monkeypatch):
  rows = read_rows(mixture)
  expected = iter(mixture_batches(config(rows=1), rows, make_tokenizer))
  batches = iter(mixture_batches(config(rows=1), rows, make_tokenizer))
  for _ in range(3):
    assert digest(next(batches)) == digest(next(expected))
  add = RowPacker.add

  def fail(self, item):
    add(self, item)
    raise InputError("in the middle of a batch")

  with monkeypatch.context() as patched:
    patched.setattr(RowPacker, "add", fail)
    with pytest.raises(InputError, match="in the middle"):
      next(batches)
  assert batches.get_state() == expected.get_state()
  assert [digest(next(batches)) for _ in range(3)] == [digest(next(expected)) for _ in range(3)]


def test_a_worker_that_is_killed_ends_the_run_in_one_line(mixture):
  batches = iter(mixture_batches(config(rows=1, workers=1), read_rows(mixture), make_tokenizer))

  def run_on(states):
    for _ in range(100):
      states.append(batches.get_state())
      next(batches)

  states = []
  next(batches)
  (worker,) = multiprocessing.active_children()
  worker.kill()
  with pytest.raises(InputError, match=r"has died. If there was too little memory .*--shm-size"):
    run_on(states)
  assert batches.get_state() == states[-1]
  assert not multiprocessing.active_children()


FAILING = """
import sys
from pathlib import Path
from tests.data.batches.small_mixture import config, make_tokenizer, read_rows
from videochat_flash_jax.data.batches.train_batches import mixture_batches
rows = read_rows(Path(sys.argv[1]))
batches = iter(mixture_batches(config(rows=1, workers=2), rows, make_tokenizer))
next(batches)
raise ValueError("of its own")
"""


@pytest.mark.slow
def test_a_program_that_fails_with_workers_tells_its_own_error_alone(mixture):
  assert_tells_its_own_error_alone(FAILING, mixture)


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from tests.data.batches.small_mixture import config, make_tokenizer, read_rows
from videochat_flash_jax.data.batches.train_batches import mixture_batches
rows = read_rows(Path(sys.argv[1]))
batches = iter(mixture_batches(config(rows=1, workers=2), rows, make_tokenizer))
next(batches)
print([process.pid for process in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_program_that_is_killed(mixture):
  process = subprocess.run(
    [sys.executable, "-c", KILLED, str(mixture)],
    env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, timeout=100,
  )  # fmt: skip
  workers = json.loads(process.stdout)
  assert process.returncode == -signal.SIGKILL and len(workers) == 2
  end = time.monotonic() + 30
  while any(is_running(worker) for worker in workers):
    assert time.monotonic() < end, "a worker goes on"
    time.sleep(0.01)


def is_running(process):
  """Whether there is such a process, other than one that nobody has taken note of."""
  try:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
