"""The page about the released models agrees with the sums of `vcflash fit`."""

import argparse
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

from videochat_flash_jax.cli.chat import add_arguments
from videochat_flash_jax.inference.fitting import Fitting, Setting, sizes_of

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([^|]+) \| (?:`(.*)` )?\| ([\d,]+) \|$", PAGE, re.M)
COMMANDS = re.findall(r"^!?(vcflash chat .*?)(?:  +#.*)?$", PAGE, re.M)


def parsed(flags):
  parser = argparse.ArgumentParser()
  add_arguments(parser)
  return parser.parse_args(shlex.split(flags))


def setting_on(machine, flags):
  """The setting of the flags, and the dtype of the machine."""
  args = parsed(flags)
  sequence = 8 // args.tensor if machine.endswith("-8") else 1
  dtype = jnp.float32 if machine.startswith("CPU") else jnp.bfloat16
  return Setting(args.weights, args.cache, None, args.tensor, sequence), dtype


@pytest.mark.parametrize("machine, gib, model, flags, frames", ROWS)
def test_the_frames_that_fit_are_those_of_fit(machine, gib, model, flags, frames):
  setting, dtype = setting_on(machine, flags)
  fitting = Fitting(sizes_of(model)[0], dtype)
  assert int(frames.replace(",", "")) == fitting.most_frames(int(float(gib) * 2**30), setting)


def test_there_are_rows_and_commands_and_their_models_exist():
  assert len(ROWS) > 10 and len(COMMANDS) > 4
  for command in COMMANDS:
    args = parsed(command.removeprefix("vcflash chat"))
    assert args.model == sizes_of(args.model)[0].name
