"""Rows of docs/memory.md that are compiled in a minute (`make test-tpu`); the others are alike."""

from pathlib import Path

import pytest

from videochat_flash_jax.cli.main import main

pytestmark = pytest.mark.tpu

ROOT = Path(__file__).parents[2]
ANSWERING = ["rows=1", "mesh.fsdp=1", "mesh.sequence=1", "tokens_per_row=8448"]


def cells(row):
  return [cell.strip() for cell in row.strip().strip("|").split("|")]


def row_in_docs(run):
  """What docs/memory.md says of a run on v5e:1x1, behind its name."""
  table = map(cells, (ROOT / "docs" / "memory.md").read_text().splitlines())
  (row,) = [row for row in table if row[:2] == [run, "v5e:1x1"]]
  return row[1:]


@pytest.mark.parametrize(
  "run, program, overrides, fits",
  [
    ("2B, a token behind 8,448", "decode", ["model=qwen2_5_2b_res448"], True),
    ("7B, prefill of 8,448", "prefill", [], False),
  ],
)
def test_a_row_of_the_tables_is_what_the_compiler_says_today(run, program, overrides, fits, capsys):
  command = ["compile", "--config", str(ROOT / "configs" / "stage3_long.py"), "--table"]
  command += ["--topology", "v5e:1x1", "--program", program]
  command += [f"--config.{override}" for override in ANSWERING + overrides]
  assert main(command) == (0 if fits else 2)
  assert cells(capsys.readouterr().out)[1:] == row_in_docs(run)
