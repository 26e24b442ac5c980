"""`vcflash demo` refuses a folder that it cannot use in one line; readme_test.py runs it whole."""

import json

import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import one_line


def refusal(out, capsys):
  assert main(["demo", "--out", str(out)]) == 2
  error = capsys.readouterr().err
  named = one_line(f"{out}:").removesuffix(":")  # a long name is cut
  assert error.startswith(f"vcflash: {named}") and error.count("\n") == 1
  return error


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300])
def test_an_out_that_cannot_be_written_is_refused(tmp_path, capsys, name):
  (tmp_path / "file").touch()
  assert "cannot be written (" in refusal(tmp_path / name, capsys)


def row(video):
  turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]
  return {"video": video, "conversations": turns}


@pytest.mark.parametrize(
  "text, complaint",
  [
    ("{}", "not written by `vcflash demo`"),
    ("not JSON", "holds no row"),
    (json.dumps([row("a.mp4") | {"video": None}]), "not written by `vcflash demo`"),
    (json.dumps([row("a.mp4"), row("b.mp4")]), "not written by `vcflash demo`"),
  ],
)
def test_annotations_of_something_else_are_refused(tmp_path, capsys, text, complaint):
  (tmp_path / "annotations.json").write_text(text)
  assert complaint in refusal(tmp_path, capsys)
