"""Tables of docs/memory.md: rows that compile in a minute; what all other steps are given."""

import math
import re
from pathlib import Path

import jax
import pytest

from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.program import train_program

pytestmark = pytest.mark.tpu

ROOT = Path(__file__).parents[2]
ANSWERING = ["rows=1", "mesh.fsdp=1", "mesh.sequence=1", "tokens_per_row=8448"]

# Rows of training: config and changes, by the name of the run and the slice.
TWO_B, ONE_ROW = "model=qwen2_5_2b_res448", "rows=1"
MILLION = ["mesh.fsdp=1", "mesh.sequence=64", "tokens_per_row=1048576", "clips_per_shard=258"]
OVER_16 = ["mesh.sequence=16", "clips_per_shard=32", "tiles_per_shard=24"]
ON_ONE = ["mesh.sequence=1", "clips_per_shard=512", "tiles_per_shard=160"]
TRAINING = {
  ("7B, stage 1", "v5e:4x4"): ["stage1_align"],
  ("7B, stage 2", "v5e:8x8"): ["stage2_pretrain"],
  ("7B, stage 3", "v5e:8x8"): ["stage3_long"],
  ("7B, stage 3", "v6e:8x8"): ["stage3_long"],
  ("7B, stage 3", "v5p:4x4x4"): ["stage3_long"],
  ("7B, a row of 1,048,576", "v5p:4x4x4"): ["stage3_long", ONE_ROW, *MILLION, "tiles_per_shard=0"],
  ("2B, stage 1", "v5e:1x1"): ["stage1_align", TWO_B, ONE_ROW],
  ("7B, stage 1", "v5e:2x2"): ["stage1_align", "rows=4"],
  ("2B, stages 2, 3", "v5e:2x2"): ["stage3_long", TWO_B, ONE_ROW],
  ("7B, stages 2, 3", "v5e:4x4"): ["stage3_long", ONE_ROW, *OVER_16],
  ("2B, stage 4", "v5e:2x2"): ["stage4_highres", TWO_B, ONE_ROW],
  ("7B, stage 4", "v5e:2x2"): ["stage4_highres", ONE_ROW],
  ("2B, adapters (LoRA)", "v5e:1x1"): ["finetune", *ON_ONE],
  ("2B, adapters (LoRA)", "v5e:2x2"): ["finetune"],
}


def tables():
  """Cells of all rows, behind the name of the run (without its note) and the slice."""
  rows = {}
  for line in (ROOT / "docs" / "memory.md").read_text().splitlines():
    run, slice_, *rest = cells(line) if line.count("|") > 8 else ("", "")
    if ":" in slice_:
      rows[run.rstrip("⁰¹²³⁴⁵⁶⁷⁸ "), slice_] = rest
  return rows


def cells(row):
  return [cell.strip() for cell in row.strip().strip("|").split("|")]


@pytest.mark.parametrize(
  "run, program",
  [("2B, prefill of a chunk of 8,448", "prefill"), ("2B, a token behind 8,448", "decode")],
)
def test_a_row_of_the_tables_is_what_the_compiler_says_today(run, program, capsys):
  command = ["compile", "--config", str(ROOT / "configs" / "stage3_long.py"), "--table"]
  command += ["--topology", "v5e:1x1", "--program", program]
  command += [f"--config.{override}" for override in [*ANSWERING, TWO_B]]
  assert main(command) == 0
  assert cells(capsys.readouterr().out)[2:] == tables()[run, "v5e:1x1"]


def test_every_row_of_training_is_of_a_step_that_takes_as_much_today():
  """Weights, optimizer and two batches follow from shapes; the compiler pads them a little."""
  fitting = {at for at, row in tables().items() if "does not fit" not in row[0]}
  assert set(TRAINING) == {at for at in fitting if not re.search("prefill|behind", at[0])}
  for (run, slice_), (name, *overrides) in TRAINING.items():
    overrides = [f"--config.{override}" for override in overrides]
    settings = train_settings(read_config(ROOT / "configs" / f"{name}.py", overrides))
    program = train_program(settings, ahead_of_time.topology_devices(slice_))
    given = jax.tree.leaves((program.state, program.batch, program.batch))
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in given)
    padding = float(tables()[run, slice_][1]) - size / 2**30
    assert -0.01 < padding < 0.05, (run, slice_)
