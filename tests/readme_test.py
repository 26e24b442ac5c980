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
OUR_COMMANDS = [words for words in COMMANDS if words and words[0].endswith("vcflash")]
STAGES = load_config(ROOT / "configs" / "tiny.py").stages
# A run of half an hour is cut to its first steps, which take less time than to compile them well;
# everything else runs as it is written, and as it does for users.
SHORTENED = {"train": [f"--config.stages.{stage}.num_steps=2" for stage in STAGES]}
# The benchmarks run once, on little: on films of seconds, on prompts of some hundred tokens.
SHORT_BENCHMARKS = {
  "vit": """
from functools import partial
from videochat_flash_jax.benchmarks import vit
vit.run = partial(vit.run, 1, clips=1)
""",
  "decode": """
from functools import partial
from videochat_flash_jax.benchmarks import decode
decode.run = partial(decode.run, 1, prompt_tokens=512, new_tokens=4)
""",
  "read": """
from videochat_flash_jax.benchmarks.read import FILMS
FILMS |= {
  name: film._replace(num_frames=min(film.num_frames, 240), height=112, width=200, repeats=1)
  for name, film in FILMS.items()
}
""",
  "pipeline": """
from functools import partial
from videochat_flash_jax.benchmarks import pipeline
little = pipeline.Load(film_frames=(200, 400, 800, 1600), tokens=2048, frames=(8, 64))
pipeline.run = partial(pipeline.run, little)
""",
  "watch": """
from functools import partial
from videochat_flash_jax.benchmarks import watch
watch.run = partial(watch.run, frames=(64, 128))
""",
  "prefill": """
from videochat_flash_jax.benchmarks.prefill import PROMPTS
PROMPTS |= {name: prompt._replace(num_tokens=600) for name, prompt in PROMPTS.items()}
""",
  "second-question": """
from functools import partial
from videochat_flash_jax.benchmarks import second_question
cases = {"tiny": second_question.CASES["tiny"]}
second_question.run = partial(second_question.run, frames=(64,), cases=cases, repeats=1)
""",
  "length": """
from functools import partial
from videochat_flash_jax.benchmarks import length
length.run = partial(length.run, frames=(64, 128), stream=160, window=32)
""",
}


def run(arguments, folder, *, compile_quickly=False):
  """Runs `vcflash` or Python code as a user would, elsewhere than in the repository."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  if not compile_quickly:
    environment.pop("XLA_FLAGS", None)
  result = subprocess.run(
    [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, f"{arguments}: {result.stderr[-2000:]}"
  return result.stdout


def vcflash(arguments, folder):
  code = "import sys; from videochat_flash_jax.cli.main import main; sys.exit(main())"
  code = SHORT_BENCHMARKS.get(arguments[1], "") + code if arguments[0] == "bench" else code
  more = SHORTENED.get(arguments[0], [])
  return run(["-c", code, *arguments, *more], folder, compile_quickly=bool(more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder after `make demo`."""
  folder = tmp_path_factory.mktemp("readme")
  (folder / "configs").symlink_to(ROOT / "configs")
  assert "3 of 3 right" in vcflash(["demo"], folder)
  return folder


def test_every_command_is_known():
  assert OUR_COMMANDS
  for command in filter(None, COMMANDS):
    assert command[0] in ("make", ".venv/bin/vcflash"), command


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  for command in COMMANDS:
    if command and command[0] == "make":
      assert re.search(rf"^{command[1]}:", makefile, re.M), command


@pytest.mark.slow
@pytest.mark.parametrize("command", OUR_COMMANDS, ids=" ".join)
def test_a_command_runs_where_those_before_have_run(command, folder):
  arguments = command[1:]
  output = vcflash(arguments, folder)
  if arguments[0] == "evaluate":  # of the model that ships, about videos that training did not see
    score = json.loads(output)
    assert score["rows"] == 202 and score["right"] >= 0.99 * score["rows"]
  if arguments[0] == "train":
    workdir = folder / arguments[arguments.index("--workdir") + 1]
    assert all((workdir / stage / "checkpoints" / "2").is_dir() for stage in STAGES)


@pytest.mark.slow
def test_the_python_runs(folder):
  code = [block for language, block in BLOCKS if language == "python"]
  assert code
  assert run(["-c", "\n".join(code)], folder).strip()
