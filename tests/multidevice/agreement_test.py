"""What one of two processes cannot use, both refuse: neither waits for the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multidevice.two_processes_test import free_port

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, os, sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
address, number = sys.argv[1:]
join_processes(address, 2, int(number))
from tests.train import small_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.loop import train

def said(workdir, changes):
  config = small_config.get_config()
  config.update_from_flattened_dict({"rows": 2, **changes})
  try:
    train(config, Path(workdir))
  except InputError as error:
    return str(error)

refusals = [
  said("one", {"mesh.sequence": 3} if number == "1" else {}),
  said("one", {"seed": 7} if number == "1" else {}),
  said(f"of_{number}", {}),
  said("one", {"init_from": "nowhere"}),
]
print(json.dumps(refusals), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
  """What each of two processes said of four configs."""
  folder, address = tmp_path_factory.mktemp("two"), f"localhost:{free_port()}"
  devices = "--xla_force_host_platform_device_count=1"
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": devices}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number)],
      env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for number in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), outputs
  assert not list(folder.rglob(".seen*")) and not list(folder.rglob("config.json"))
  return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_a_refusal_of_one_process_is_that_of_both(refusals):
  first, second = (said[0] for said in refusals)
  assert second.startswith("mesh: ") and first == f"process 1: {second}"


def test_processes_with_different_configs_say_so(refusals):
  words = "process 1 has another config than process 0: give the same --config "
  assert all(said[1].startswith(words) for said in refusals)


def test_a_directory_that_each_host_has_for_itself_is_noticed(refusals):
  first, second = (said[2] for said in refusals)
  assert second.startswith(
    "--workdir of_1: a file that process 0 writes there is not visible here: give "
  )
  assert first == f"process 1: {second}"


def test_what_the_first_process_cannot_begin_with_ends_both(refusals):
  first, second = (said[3] for said in refusals)
  assert "'nowhere'" in first and second == f"process 0: {first}"
