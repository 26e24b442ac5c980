"""`vcflash synth` writes what it says, and refuses what it cannot write in one line."""

import json

import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import one_line


def test_synth_writes_videos_and_rows(tmp_path, capfd):
  out = tmp_path / "world"
  arguments = ["--videos", "2", "--frames", "4:8", "--seed", "5", "--questions-per-video", "2"]
  assert main(["synth", "--out", str(out), *arguments]) == 0
  rows = json.loads((out / "annotations.json").read_text())
  assert {row["video"] for row in rows} == {"videos/0000.mp4", "videos/0001.mp4"}
  assert {row["kind"] for row in rows} == {"attribute"}
  output = capfd.readouterr()
  assert output.out == f"{out}: 2 video(s) and {len(rows)} question(s) written\n"
  assert output.err == ""  # a progress bar is for a terminal


def test_a_colon_in_the_directory_is_a_letter_as_any_other(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(["synth", "--out", "a:b", "--videos", "1", "--frames", "4:4"]) == 0
  assert (tmp_path / "a:b" / "videos" / "0000.mp4").is_file()


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    (["--frames", "5:7"], "no multiple of 4 lies in the range of frames 5:7"),
    (["--frames", f"8:{10**30}"], "lasts more than a day"),
    (["--frames", "8"], "--frames '8' is not MIN:MAX"),
    (["--videos", "0"], "--videos is 0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--questions", "attribute,smell"], "unknown question kind 'smell'"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, complaint):
  out = tmp_path / "world"
  assert main(["synth", "--out", str(out), *arguments]) == 2
  error = capsys.readouterr().err
  assert complaint in error and error.count("\n") == 1
  assert not out.exists()


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300, "taken", "blocked"])
def test_an_out_that_cannot_be_written_is_refused(tmp_path, capsys, name):
  (tmp_path / "file").touch()
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "videos").touch()
  (tmp_path / "blocked" / "videos" / "0000.mp4").mkdir(parents=True)
  out = tmp_path / name
  assert main(["synth", "--out", str(out), "--videos", "1", "--frames", "4:4"]) == 2
  error = capsys.readouterr().err
  named = one_line(f"{out}:")  # a long name is cut
  assert error.startswith(f"vcflash: {named} cannot be written (")
  assert error.endswith("; give another --out\n") and error.count("\n") == 1
