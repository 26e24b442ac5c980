"""Two processes share each row of a batch: both hold the same rows, also if one cannot read a file.

All but the training is seen through one pair of processes, which read three times from the start.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental import multihost_utils

from tests.data.batches.saved_batches import digest
from tests.data.batches.small_mixture import config, make_tokenizer, read_rows, write_mixture
from tests.fake_devices import fake_devices
from tests.multidevice.device_batches_test import shardings
from tests.multidevice.two_processes_test import free_port
from tests.train.small_runs import records
from videochat_flash_jax.data.batches import examples, train_batches
from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.train.device_batches import (
  StreamExchanges,
  device_batches,
  own_streams,
  stream_readers,
)

ROOT = Path(__file__).parents[2]
SHAPE = NUM_ROWS, _ = 2, 256
CONFIG = config(rows=NUM_ROWS, streams=1, max_broken_share=1.0)  # in two shards
NUM_BATCHES = 3


def fail_once(monkeypatch):
  """The first video that is read from now on cannot be read."""
  read, calls = examples.read_row_video, []

  def failing(*args):
    calls.append(args)
    if len(calls) == 1:
      raise FileNotFoundError("the server of the files has a short rest")
    return read(*args)

  monkeypatch.setattr(examples, "read_row_video", failing)


def spoil_second_batch(monkeypatch):
  write, calls = train_batches.write_row, []

  def spoiled(packed, row_shape, batch, number):
    write(packed, row_shape, batch, number)
    calls.append(number)
    if len(calls) == NUM_ROWS + 1:
      batch["token_ids"][number, 5] += 1

  monkeypatch.setattr(train_batches, "write_row", spoiled)


ROUNDS = ((1, fail_once), (0, fail_once), (1, spoil_second_batch))  # in which process, and what


def seen(mixture):
  """What this process sees in each round: digests of whole batches, or an error."""
  placed, found = shardings(MeshConfig(fsdp=1, sequence=2)), []
  readers = stream_readers(placed["token_ids"], SHAPE, 1)
  assert readers == {0: [0, 1]} and own_streams(placed["token_ids"], SHAPE, 1) == [0]
  gather = functools.partial(multihost_utils.process_allgather, tiled=True)
  for process, disturb in ROUNDS:
    exchanges = StreamExchanges(readers, "step")
    batches = mixture_batches(CONFIG, read_rows(mixture), make_tokenizer, sharing=exchanges)
    with pytest.MonkeyPatch.context() as monkeypatch:
      if jax.process_index() == process:
        disturb(monkeypatch)
      batches = device_batches(batches, placed, NUM_ROWS, exchanges)
      try:
        found.append([digest(jax.tree.map(gather, next(batches))) for _ in range(NUM_BATCHES)])
      except InputError as error:
        found.append(str(error))
      batches.close()
  return found


PROCESS = f"""
import json, sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
join_processes(sys.argv[1], 2, int(sys.argv[2]))
from tests.multidevice.{Path(__file__).stem} import seen
print(json.dumps(seen(Path(sys.argv[3]))))
"""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mixture")
  path = write_mixture(folder, num_videos=4, num_images=2, num_texts=2)
  read_rows(path)
  return path


@pytest.fixture(scope="module")
def rounds(mixture):
  """What the two processes have seen in each round."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), **fake_devices(1, num_processes=2)}
  command = [sys.executable, "-c", PROCESS, f"localhost:{free_port()}"]
  processes = [
    subprocess.Popen(
      [*command, str(number), str(mixture)],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for number in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), [e[-3000:] for _, e in outputs]
  first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
  return list(zip(first, second, strict=True))


def of_one_process(mixture):
  """Digests of the batches of a process that shares nothing."""
  batches = iter(mixture_batches(CONFIG, read_rows(mixture), make_tokenizer))
  return [digest(next(batches)) for _ in range(NUM_BATCHES)]


def test_a_file_that_the_second_process_cannot_read_once_changes_nothing(mixture, rounds):
  expected = of_one_process(mixture)
  assert rounds[0] == (expected, expected)


def test_a_stand_in_that_the_first_process_takes_is_that_of_both(mixture, rounds, monkeypatch):
  undisturbed = of_one_process(mixture)
  fail_once(monkeypatch)
  expected = of_one_process(mixture)
  assert rounds[1] == (expected, expected) and expected != undisturbed


def test_a_row_that_was_packed_otherwise_stops_both_before_its_step(rounds):
  first, second = rounds[2]
  assert first == second and "\n" not in first
  assert first.startswith("step 2: processes 0 and 1 share rows, but have packed different ones; ")


TRAINING = """
import sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
address, num_processes, number, mixture, workdir = sys.argv[1:]
if num_processes == "2":
  join_processes(address, 2, int(number))
from videochat_flash_jax.data.batches import examples
from videochat_flash_jax.train.loop import train
from tests.train.mixture_run_test import run_config
read, seen = examples.read_row_video, set()

def failing(row, *args):
  if row["video"] not in seen and row["video"].endswith(("1.mp4", "3.mp4")):
    seen.add(row["video"])
    raise FileNotFoundError(row["video"])
  return read(row, *args)

if number == "1":
  examples.read_row_video = failing
changes = {"mesh__sequence": 2, "sequence_parallel": "ring", "log_every": 1, "num_steps": 6}
changes |= {"eval__mixture": mixture, "eval__every": 2}
train(run_config(mixture, **changes), Path(workdir))
"""


@pytest.mark.slow
def test_training_and_evaluation_go_on_though_files_fail_once_in_one_process(
  tmp_path, tmp_path_factory
):
  mixture = write_mixture(tmp_path_factory.mktemp("videos"), num_videos=4, num_images=0)
  read_rows(mixture)
  address, logs = f"localhost:{free_port()}", []
  for num_processes in (1, 2):
    workdir = tmp_path / str(num_processes)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= fake_devices(2 // num_processes, num_processes)
    given = [address, str(num_processes)], [str(mixture), str(workdir)]
    command = [sys.executable, "-c", TRAINING, *given[0]]
    processes = [
      subprocess.Popen([*command, str(number), *given[1]], env=environment, stderr=subprocess.PIPE)
      for number in range(num_processes)
    ]
    try:
      errors = [process.communicate(timeout=500)[1].decode() for process in processes]
    finally:
      for process in processes:
        process.kill()
    assert not any(process.returncode for process in processes), "\n".join(
      e[-3000:] for e in errors
    )
    logs.append(
      [record for record in records(workdir) if "loss" in record or "eval/loss" in record]
    )
  assert errors[1].count("process 1 tries") == 2
  assert len(logs[0]) == len(logs[1]) == 9
  for one, two in zip(*logs, strict=True):
    for name in {"step", "loss", "eval/loss", "grad_norm", "examples_per_step"} & {*one, *two}:
      assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert not any(name.startswith("data/broken/") for name in two)
