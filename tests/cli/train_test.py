"""`vcflash train`: config files, overrides, and a run from nothing to a model that loads."""

import json
from pathlib import Path

import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.cli.train import apply_override, load_config
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


def test_a_missing_config_file_and_one_without_a_config_are_refused(tmp_path, capsys):
  (tmp_path / "empty.py").write_text("")
  for name, complaint in (("nowhere.py", "no such file"), ("empty.py", "no get_config()")):
    assert main(["train", "--config", str(tmp_path / name), "--workdir", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_run_leaves_a_log_checkpoints_and_a_model_that_loads(tmp_path, capsys):
  from videochat_flash_jax.inference.chat import VideoChat

  workdir = tmp_path / "run"
  arguments = ["train", "--config", str(TINY), "--workdir", str(workdir)]
  arguments += ["--config.stages=('encoder', 'short')"]
  for stage in ("encoder", "short"):
    arguments += [f"--config.{stage}.num_steps=2"]
  arguments += ["--config.encoder.videos=1", "--config.short.rows=1"]
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
  assert VideoChat.from_pretrained(workdir / "export").config.decoder.tied_embeddings

  assert main(arguments) == 2  # A finished run is not written over.
  assert "export exists" in capsys.readouterr().err
