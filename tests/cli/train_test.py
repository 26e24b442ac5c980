"""`vcflash train`: config files, overrides, and a run from nothing to a model that loads."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.checkpoints.runs.run_files import whole_steps
from videochat_flash_jax.cli.config_file import apply_override, load_config
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.preemption import Preemption

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"
SMALL = ROOT / "tests" / "train" / "small_config.py"


def test_an_override_sets_a_field_to_a_value_of_its_type():
  config = load_config(TINY)
  apply_override(config, "--config.stages.stage1_align.optimizer.learning_rate=1e-3")
  apply_override(config, "--config.stages.stage3_long.data.frames=(4, 8)")
  stages = config.stages
  assert stages.stage1_align.optimizer.learning_rate == 1e-3
  assert tuple(stages.stage3_long.data.frames) == (4, 8)


@pytest.mark.parametrize("path", ["2024", "1e3", "(1, 2)", "[1]", "True", "0x10", "{}", "(" * 9999])
def test_a_path_may_read_like_a_number(path):
  config = load_config(TINY.with_name("stage3_long.py"))
  for field in ("init_from", "data.mixture", "eval.mixture"):
    apply_override(config, f"--config.{field}={path}")
  assert config.init_from == config.data.mixture == config.eval.mixture == path


def test_a_seed_is_that_of_all_stages():
  config = load_config(TINY)
  apply_override(config, "--config.seed=7")
  assert {stage.seed for stage in config.stages.values()} == {7}


@pytest.mark.parametrize(
  "override, complaint",
  [
    ("--config.stages.stage1_align.num_step=1", r"no field 'stages\.stage1_align\.num_step': did "),
    ("--config.sed=1", "did you mean seed"),
    ("--config.xyzzy=1", "did you mean"),
    ("--config.stages.stage3_long.mesh=2", "mesh takes fields by name: set it in a copy"),
    ("--config.stages.stage1_align.rows=many", r"rows=many: the field is of type int"),
    ("--config.seed", r"write --config\.FIELD=VALUE"),
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
    (b"\x7fELF\x00\xff\xfe", "correct the file"),
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


def arguments(config, workdir, *overrides):
  return ["train", "--config", str(config), "--workdir", str(workdir), *overrides]


def test_a_config_that_cannot_be_trained_leaves_no_workdir(tmp_path, capsys):
  command = arguments(SMALL, tmp_path / "run", "--config.num_steps=0")
  assert main(command) == 2
  assert "config.num_steps is 0: give a positive integer" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_workdir_below_a_file_is_refused(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run"
  assert main(arguments(SMALL, workdir)) == 2
  assert f"--workdir {workdir}: cannot be written" in capsys.readouterr().err


def test_processes_that_are_told_half_are_refused(tmp_path, capsys):
  assert main([*arguments(SMALL, tmp_path / "run"), "--process-id=1"]) == 2
  assert "give coordinator, num_processes and process_id together" in capsys.readouterr().err


def test_a_run_leaves_a_log_and_a_checkpoint_that_is_exported_and_loads(tmp_path, capsys):
  from videochat_flash_jax.inference.chat import VideoChat

  workdir = tmp_path / "c%20d #1? [run] | a+b"
  assert main(arguments(SMALL, workdir, "--config.num_steps=2")) == 0
  said = capsys.readouterr().out
  assert str(workdir / "checkpoints") in said
  assert shlex.split(said.splitlines()[-1])[1:4] == ["convert", "--model", str(workdir)]
  assert {path.name for path in workdir.iterdir()} >= {
    "checkpoints", "config.json", "hub", "train_log.jsonl", "train_log.txt",
  }  # fmt: skip
  assert list(workdir.glob("events.*"))
  log = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  assert log[0]["event"] == "start" and log[0]["config"]["seed"] == 0
  assert [line["step"] for line in log[1:]] == [1, 2, 2]
  assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "model_tflops"} <= set(log[1])
  assert main(["convert", "--model", str(workdir), "--out", str(tmp_path / "export")]) == 0
  loaded = VideoChat.from_pretrained(workdir).config
  assert loaded.decoder == VideoChat.from_pretrained(tmp_path / "export").config.decoder


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("c%20d", "c d"), ("a#b? | [1]", "a"), ("e\\f", "e/f")])
def test_a_run_of_any_name_resumes_is_exported_and_answers(
  tmp_path, monkeypatch, capsys, name, other
):
  command = ["--config.num_steps=2", "--config.eval.every=100"]
  assert main(arguments(SMALL, tmp_path / other, *command, "--config.seed=1")) == 0
  workdir, out, world = (tmp_path / f"{name}{ending}" for ending in ("", " out", " world"))
  with monkeypatch.context() as patched:
    patched.setattr(Preemption, "is_due", lambda _: True)
    assert main(arguments(SMALL, workdir, *command)) == 0
  assert whole_steps(workdir / "checkpoints") == [1]
  assert main(arguments(SMALL, workdir, *command)) == 0
  assert whole_steps(workdir / "checkpoints") == [1, 2]
  events = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  assert [event["event"] for event in events if "event" in event] == ["start", "resume"]
  assert main(["convert", "--model", str(workdir), "--out", str(out)]) == 0
  assert main(["synth", "--out", str(world), "--videos", "1", "--frames", "4:4"]) == 0
  scores = []
  for model in (workdir, out):
    capsys.readouterr()
    annotations = ["--annotations", str(world / "annotations.json"), "--json"]
    assert main(["evaluate", "--model", str(model), *annotations]) == 0
    scores.append(json.loads(capsys.readouterr().out)["wrong"])
  assert scores[0] == scores[1] and scores[0]
  embeddings = [
    np.concatenate(list(open_checkpoint(path).tensors["model.embed_tokens.weight"].blocks()))
    for path in (workdir, out, tmp_path / other)
  ]
  np.testing.assert_array_equal(embeddings[0], embeddings[1])
  assert (embeddings[0] != embeddings[2]).any()
  again = arguments(SMALL, tmp_path / f"{name} again", *command, f"--config.init_from={workdir}")
  assert main(again) == 0
