"""`vcflash synth` writes what it says, and refuses what it cannot write in one line."""

import json

import pytest

from videochat_flash_jax.cli.main import main


def test_synth_writes_videos_and_rows(tmp_path, capsys):
  out = tmp_path / "world"
  arguments = ["--videos", "2", "--frames", "4:8", "--seed", "5", "--questions-per-video", "2"]
  assert main(["synth", "--out", str(out), *arguments]) == 0
  rows = json.loads((out / "annotations.json").read_text())
  assert {row["video"] for row in rows} == {"videos/0000.mp4", "videos/0001.mp4"}
  assert {row["kind"] for row in rows} == {"attribute"}
  assert f"2 videos and {len(rows)} questions written to {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    (["--frames", "5:7"], "no multiple of 4 lies in the range of frames 5:7"),
    (["--frames", "8"], "--frames '8' is not MIN:MAX"),
    (["--videos", "0"], "--videos is 0"),
    (["--questions", "attribute,smell"], "unknown question kind 'smell'"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, complaint):
  out = tmp_path / "world"
  assert main(["synth", "--out", str(out), *arguments]) == 2
  error = capsys.readouterr().err
  assert complaint in error and error.count("\n") == 1
  assert not out.exists()
