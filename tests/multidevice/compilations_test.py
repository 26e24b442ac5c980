"""Between steps nothing is compiled: neither by a line of the log nor by a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_devices import fake_devices
from tests.multidevice.two_processes_test import free_port

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
address, number, total, folder = sys.argv[1:]
if int(total) > 1:
  join_processes(address, int(total), int(number))
import jax
from tests.train import small_config
from videochat_flash_jax.parallel.agreement import allgather_text
from videochat_flash_jax.train import loop, metrics

seconds = {}  # of the compilations since a line of the log, by its step
step = [0]

def heard(event, duration, **_):
  if event == "/jax/core/compile/backend_compile_duration":
    seconds.setdefault(step[0], []).append(duration)

jax.monitoring.register_event_duration_secs_listener(heard)
write = metrics.RunLog.write

def written(self, now, **fields):
  write(self, now, **fields)
  if "loss" in fields:
    step[0] = now

metrics.RunLog.write = written
config = small_config.get_config()
config.update_from_flattened_dict({"rows": 2, "num_steps": 12, "checkpoint.every": 3})
loop.train(config, Path(folder))
long = "long " * 3_000_000
texts = allgather_text(f"{number} " + long)
assert [text[:2] for text in texts] == [f"{n} " for n in range(int(total))]
assert all(len(text) == 2 + len(long) for text in texts)
print(json.dumps(seconds), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("total", [1, 2])
def test_after_the_first_steps_nothing_is_compiled(tmp_path, total):
  address = f"localhost:{free_port()}"
  environment = os.environ | fake_devices(1, num_processes=2) | {"PYTHONPATH": str(ROOT)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number), str(total), str(tmp_path / "run")],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for number in range(total)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=500) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), outputs
  for output, _ in outputs:
    compiled = json.loads(output.splitlines()[-1])
    assert "0" in compiled, "the step itself"
    # The first checkpoint is written behind the line of step 3.
    assert not {step for step in compiled if int(step) > 3}, compiled
