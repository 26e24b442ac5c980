"""Every command and every line of Python in the README runs, in its order."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from videochat_flash_jax.cli.config_file import load_config

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
COMMANDS = [
  shlex.split(line, comments=True)
  for language, block in BLOCKS
  if language == "bash"
  for line in block.replace("\\\n", " ").splitlines()
]
VERBS_THAT_TAKE_MINUTES = ("synth", "evaluate", "train", "bench")
STAGES = load_config(ROOT / "configs" / "tiny.py").stages
# A run of half an hour is cut to its first steps; everything else runs as it is written.
SHORTENED = {"train": [f"--config.stages.{stage}.num_steps=2" for stage in STAGES]}


def run(arguments, folder):
  """Runs `vcflash` or Python code as a user would, elsewhere than in the repository."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, f"{arguments}: {result.stderr[-2000:]}"
  return result.stdout


def vcflash(arguments, folder):
  return run(
    [
      "-c",
      "import sys; from videochat_flash_jax.cli.main import main; sys.exit(main())",
      *arguments,
    ],
    folder,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder after `make demo`."""
  folder = tmp_path_factory.mktemp("readme")
  (folder / "configs").symlink_to(ROOT / "configs")
  assert "3 of 3 right" in vcflash(["demo"], folder)
  return folder


def commands(*, slow):
  """Those of `vcflash`, without its name; what needs a run's directory is as slow as the run."""
  chosen = [c[1:] for c in COMMANDS if c and c[0].endswith("vcflash")]
  needs_run = {tuple(c) for c in chosen if any(part.startswith("runs/") for part in c)}
  return [c for c in chosen if (c[0] in VERBS_THAT_TAKE_MINUTES or tuple(c) in needs_run) == slow]


def test_every_command_is_known():
  for command in filter(None, COMMANDS):
    assert command[0] in ("make", ".venv/bin/vcflash"), command


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  for command in COMMANDS:
    if command and command[0] == "make":
      assert re.search(rf"^{command[1]}:", makefile, re.M), command


@pytest.mark.slow
def test_short_commands_run(folder):
  assert commands(slow=False)
  for command in commands(slow=False):
    vcflash(command, folder)


@pytest.mark.slow
def test_long_commands_run(folder):
  assert commands(slow=True)
  for command in commands(slow=True):
    output = vcflash([*command, *SHORTENED.get(command[0], [])], folder)
    print(f"{' '.join(command)}\n{output}")
    if command[0] == "evaluate":  # of the model that ships, about videos that training did not see
      score = json.loads(output)
      assert score["rows"] == 202 and score["right"] >= 0.99 * score["rows"]


@pytest.mark.slow
def test_the_python_runs(folder):
  code = [block for language, block in BLOCKS if language == "python"]
  assert code
  assert run(["-c", "\n".join(code)], folder).strip()
