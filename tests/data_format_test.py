"""The example of docs/data_format.md runs as it is written."""

import json
import re
import shlex
from pathlib import Path

import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.data.mixture.broken import REASONS

TEXT = (Path(__file__).parent.parent / "docs" / "data_format.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.S | re.M)
FILES = {"jsonl": "rows.jsonl", "yaml": "mixture.yaml", "csv": "table.csv"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder in which everything of the page was written and run."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("VCF_CACHE_DIR", str(tmp_path / "cache"))
  for language, block in BLOCKS:
    if language in FILES:
      assert f"`{FILES[language]}`" in TEXT
      Path(FILES[language]).write_text(block)
    elif language == "python":
      exec(compile(block, "data_format.md", "exec"), {})
    else:
      for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert (program, main(arguments)) == ("vcflash", 0), line
  return tmp_path


@pytest.mark.slow
def test_the_whole_page_runs_and_its_mixture_is_healthy(folder, capsys):
  assert main(["data", "check", "mixture.yaml", "--all", "--json"]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert report["broken"] == 0
  first, second = report["sources"]
  assert first["kinds"] == {"video": 2, "image": 2, "text": 1}
  assert (first["rows"], second["rows"]) == (5, 4)
  assert first["opened"] == {"video": 2, "image": 3}
  assert len((folder / "more.jsonl").read_text().splitlines()) == 2


def test_every_reason_is_explained():
  table = re.findall(r"^\| ([^|]+) \|", TEXT, re.M)[1:]
  assert sorted(REASONS) == sorted(reason for cell in table[1:] for reason in cell.split(", "))
