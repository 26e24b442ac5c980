"""`vcflash convert` writes what it is asked for, or says in one line why it does not."""

import shlex

import pytest
from safetensors.numpy import load_file

from tests.checkpoints.small_checkpoints import with_far_token
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.cli import convert
from videochat_flash_jax.cli.main import main


def run(*arguments):
  return main(["convert", *map(str, arguments)])


def test_the_example_runs_and_its_model_has_a_tokenizer(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(shlex.split(convert.EXAMPLE)[1:]) == 0
  tensors = load_file(tmp_path / "tiny-hf" / "model.safetensors")
  num_bytes = sum(tensor.nbytes for tensor in tensors.values())
  assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
  assert capsys.readouterr().out == f"tiny-hf: {len(tensors)} tensors, {num_bytes:,} bytes\n"
  tiny = checkpoint_directory("tiny") / "tokenizer.model"
  assert (tmp_path / "tiny-hf" / "tokenizer.model").read_bytes() == tiny.read_bytes()


def test_a_tokenizer_with_ids_that_the_model_does_not_embed_is_refused(tmp_path, capsys):
  model = with_far_token(tmp_path / "far")
  error = refusal(capsys, "--model", model, "--out", tmp_path / "out")
  assert f"{model}: the highest id of the tokenizer is 768, but the model embeds only 768" in error
  assert not (tmp_path / "out").exists()
  assert run("--model", with_far_token(tmp_path / "near", 767), "--out", tmp_path / "out") == 0


def test_a_tokenizer_that_cannot_be_read_goes_along(tmp_path):
  model = with_far_token(tmp_path / "model")
  (model / "tokenizer.json").write_text("{}")
  assert run("--model", model, "--out", tmp_path / "out") == 0
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def refusal(capsys, *arguments):
  assert run(*arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("vcflash: ") and error.count("\n") == 1
  return error


def test_an_out_that_exists_is_refused_before_anything_is_opened(tmp_path, capsys):
  assert "exists already" in refusal(capsys, "--model", "no/such", "--out", tmp_path)


def test_a_model_that_is_none_is_refused(tmp_path, capsys):
  error = refusal(capsys, "--model", "tinny", "--out", tmp_path / "out")
  assert "did you mean tiny" in error


@pytest.mark.parametrize(
  "flags, complaint",
  [
    (["--projector", "mm_projector.bin"], "--projector and --tower need --encoder"),
    (["--tower", "umt-large"], "--projector and --tower need --encoder"),
    (["--encoder", "UMT-L_f4_vision.pt"], "--encoder needs --tower; give one of umt-large, umt-hd"),
    (["--encoder", "a.pt", "--tower", "umt-large"], "give a Qwen2 language model"),
    (["--encoder", "a.pt", "--tower", "siglip"], "invalid choice: 'siglip'"),
    (["--to", "orbax"], "invalid choice: 'orbax'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--weights", "int4"], "argument --weights: invalid choice: 'int4' (choose from "),
    (["--seed", "-1"], "--seed is -1"),
  ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, flags, complaint):
  assert complaint in refusal(capsys, "--model", "tiny", "--out", tmp_path / "out", *flags)
  assert not list(tmp_path.iterdir())


def test_int8_weights_are_written_once_and_stay(tmp_path, capsys):
  assert run("--model", "tiny", "--out", tmp_path / "int8", "--weights", "int8") == 0
  assert run("--model", tmp_path / "int8", "--out", tmp_path / "same") == 0
  assert run("--model", tmp_path / "int8", "--out", tmp_path / "again", "--weights", "int8") == 0
  files = [
    (tmp_path / name / "model.safetensors").read_bytes() for name in ("int8", "same", "again")
  ]
  assert files[0] == files[1] == files[2]
  wide = checkpoint_directory("tiny") / "model.safetensors"
  assert len(files[0]) < 0.5 * wide.stat().st_size
  assert "tensors" in capsys.readouterr().out
