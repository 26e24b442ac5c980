"""`vcflash train`: config files, overrides, and a run from nothing to a model that loads."""

import json
from pathlib import Path

import pytest

from videochat_flash_jax.cli.config_file import apply_override, load_config
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


def test_an_override_sets_a_field_to_a_value_of_its_type():
  config = load_config(TINY)
  apply_override(config, "--config.encoder.peak_rate=1e-3")
  apply_override(config, "--config.short.frames=(4, 8)")
  apply_override(config, "--config.stages=('encoder',)")
  assert config.encoder.peak_rate == 1e-3
  assert tuple(config.short.frames) == (4, 8) and tuple(config.stages) == ("encoder",)


@pytest.mark.parametrize(
  "override, complaint",
  [
    ("--config.encoder.peak_rat=1", r"no field 'encoder\.peak_rat': did you mean encoder\.peak_"),
    ("--config.sed=1", "did you mean seed"),
    ("--config.short.rows=many", r"--config\.short\.rows=many: the field holds a int"),
    ("--config.short.rows", r"write --config\.FIELD=VALUE"),
    ("--confg.seed=1", r"write --config\.FIELD=VALUE"),
  ],
)
def test_a_mistyped_override_is_an_error_that_names_the_remedy(override, complaint):
  with pytest.raises(InputError, match=complaint):
    apply_override(load_config(TINY), override)


@pytest.mark.parametrize(
  "content, complaint",
  [
    (None, "no such file"),
    (b"", "no get_config()"),
    (b"def get_config(:", "SyntaxError"),
    (b"import nowhere_to_be_found", "ModuleNotFoundError"),
    (b"def get_config():\n  return 1 / 0", "ZeroDivisionError"),
    (b"def get_config():\n  return {}", "returns a ConfigDict"),
    (b"\x7fELF\x00\xff\xfe", "mend the file"),
  ],
)
def test_a_config_file_that_gives_no_config_is_refused_in_one_line(
  content, complaint, tmp_path, capsys
):
  path = tmp_path / "broken.py"
  if content is not None:
    path.write_bytes(content)
  assert main(["train", "--config", str(path), "--workdir", str(tmp_path / "run")]) == 2
  error = capsys.readouterr().err
  assert complaint in error and str(path) in error and error.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_a_config_that_cannot_be_trained_leaves_no_workdir(tmp_path, capsys):
  arguments = ["train", "--config", str(TINY), "--workdir", str(tmp_path / "run")]
  assert main([*arguments, "--config.vocab_size=100"]) == 2
  assert "config.vocab_size is 100: give an integer of 305" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_workdir_below_a_file_is_refused(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run"
  assert main(["train", "--config", str(TINY), "--workdir", str(workdir)]) == 2
  assert f"--workdir {workdir}: cannot be written" in capsys.readouterr().err


def test_a_run_leaves_a_log_checkpoints_and_a_model_that_loads(tmp_path, capsys):
  from videochat_flash_jax.inference.chat import VideoChat

  workdir = tmp_path / "run"
  arguments = ["train", "--config", str(TINY), "--workdir", str(workdir)]
  arguments += ["--config.stages=('encoder', 'short')"]
  for stage in ("encoder", "short"):
    arguments += [f"--config.{stage}.num_steps=2"]
  arguments += ["--config.encoder.videos=1", "--config.short.rows=1", "--config.vocab_size=1200"]
  assert main(arguments) == 0
  assert sorted(path.name for path in (workdir / "export").iterdir()) == [
    "config.json",
    "model.safetensors",
    "tokenizer.model",
  ]
  log = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  assert log[0]["event"] == "start" and log[0]["config"]["seed"] == 0
  assert [line["stage"] for line in log[1:-1]] == ["encoder", "short"]
  assert log[-1]["event"] == "end"
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"0", "1"}
  decoder = VideoChat.from_pretrained(workdir / "export").config.decoder
  assert decoder.tied_embeddings and decoder.vocab_size == 1200

  assert main(arguments) == 2  # A finished run is not written over.
  assert "export exists" in capsys.readouterr().err
