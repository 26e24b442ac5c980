"""Runs `vcflash train` on the small config, in processes of their own that can be killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fake_devices import fake_devices

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("small_config.py")
RUN = "import sys; from videochat_flash_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"


@contextlib.contextmanager
def started(
  workdir: Path, *arguments: str, code: str = RUN, num_devices: int = 1, num_processes: int = 1
) -> Iterator[subprocess.Popen]:
  """A process that trains in `workdir`; it is gone when the block is left."""
  command = [sys.executable, "-c", code, "train", "--config", str(CONFIG), "--workdir", workdir]
  process = subprocess.Popen(
    [*map(str, command), *arguments],
    env=os.environ | {"PYTHONPATH": str(ROOT), **fake_devices(num_devices, num_processes)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def finished(workdir: Path, *arguments: str, **options) -> str:
  """Trains until the command ends well; gives what it said."""
  with started(workdir, *arguments, **options) as process:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return output + errors


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 200):
  """Waits until a condition holds, or the process has ended by itself."""
  end = time.monotonic() + seconds
  while not condition() and process.poll() is None:
    assert time.monotonic() < end, "too slow"
    time.sleep(0.002)


def stop(
  process: subprocess.Popen, number: signal.Signals, to_group: bool = False
) -> tuple[int, str]:
  """Sends a signal, or to all of its processes; gives exit code and what was written to stderr."""
  if to_group:
    os.killpg(process.pid, number)
  else:
    process.send_signal(number)
  _, errors = process.communicate(timeout=100)
  return process.returncode, errors


def records(workdir: Path) -> list[dict]:
  """What the log holds, but for a line that is being written."""
  path = workdir / "train_log.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


def losses(workdir: Path) -> list[tuple[int, float, float]]:
  """Step, loss and norm of the gradient of each step that was logged."""
  return [(r["step"], r["loss"], r["grad_norm"]) for r in records(workdir) if "loss" in r]


def last_step(workdir: Path) -> int:
  return max((record["step"] for record in records(workdir)), default=0)
