"""`vcflash chat`, and what it says to bad input: one line, exit code 2, nothing else."""

import os
import shutil

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

QUESTION = "What colour is the star?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint directory and a video."""
  folder = tmp_path_factory.mktemp("chat")
  write_dummy_checkpoint(folder / "model")
  write_dummy_video(folder / "a.mp4", num_frames=240, fps=10)
  return folder


def chat(folder, *options, video=None, images=(), question=QUESTION, model=None):
  video, model = video or folder / "a.mp4", model or folder / "model"
  seen = ["--image", *map(str, images)] if images else ["--video", str(video)]
  options = ["--max-new-tokens", "8", *options]
  if question is not None:
    options += ["--question", question]
  return main(["chat", "--model", str(model), *seen, *options])


def refusal(capsys, code):
  """The one line of a refusal, after checking that it is one."""
  output = capsys.readouterr()
  line = output.err.strip().splitlines()[-1]
  assert code == 2
  assert line.startswith("vcflash: ")
  assert "Traceback" not in output.err
  return line


def test_a_question_gets_an_answer(folder, capsys):
  assert chat(folder, "--max-frames", "8") == 0
  seen, _, answer = capsys.readouterr().out.partition("\n")
  assert "24.0 s, 8 frames seen" in seen
  assert len(answer) > 1  # that of a random model may hold anything, a line's end, too


def test_images_are_looked_at(folder, capsys, tmp_path):
  paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
  for path in paths:
    Image.new("RGB", (64, 32), "red").save(path)
  assert chat(folder, images=paths[:1]) == 0
  assert chat(folder, images=paths) == 0
  output = capsys.readouterr().out
  assert output.startswith(f"{paths[0]}: 3 tiles seen\n")
  assert f"\n{paths[0]}, {paths[1]}: 2 tiles seen\n" in output


def test_either_a_video_or_images_are_asked_about(folder, capsys):
  assert "not allowed with" in refusal(capsys, chat(folder, "--image", "a.png"))
  line = refusal(capsys, main(["chat", "--model", "tiny", "--question", QUESTION]))
  assert "one of the arguments --video --image is required" in line


def test_frames_of_images_cannot_be_counted(folder, capsys):
  line = refusal(capsys, chat(folder, "--max-frames", "8", images=["a.png"]))
  assert "--max-frames counts frames of a video" in line


def test_a_missing_image_is_named(folder, capsys):
  assert "nothing.png" in refusal(capsys, chat(folder, images=["nothing.png"]))


def test_a_video_is_no_image(folder, capsys):
  line = refusal(capsys, chat(folder, images=[folder / "a.mp4"]))
  assert "a.mp4: not a readable picture" in line


def test_without_a_question_a_prompt_asks_until_told_to_quit(folder, capsys, monkeypatch):
  typed = iter([QUESTION, "star " * 3000, "", "And then?", "quit"])
  monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
  assert chat(folder, question=None) == 0
  assert "context" in capsys.readouterr().out
  assert next(typed, None) is None  # the question that is too long did not end the conversation


def test_the_end_of_input_ends_the_prompt(folder, monkeypatch):
  def closed(prompt):
    raise EOFError

  monkeypatch.setattr("builtins.input", closed)
  assert chat(folder, question=None) == 0


def test_a_missing_video_is_named(folder, capsys):
  assert "nothing.mp4" in refusal(capsys, chat(folder, video=folder / "nothing.mp4"))


def test_a_text_file_named_mp4_is_named(folder, capsys, tmp_path):
  (tmp_path / "text.mp4").write_text("This is no video.\n" * 100)
  assert "text.mp4" in refusal(capsys, chat(folder, video=tmp_path / "text.mp4"))


def test_a_truncated_video_is_named(folder, capsys, tmp_path):
  whole = (folder / "a.mp4").read_bytes()
  (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
  assert "half.mp4" in refusal(capsys, chat(folder, video=tmp_path / "half.mp4"))


def test_a_file_without_pictures_is_named(folder, capsys, tmp_path):
  path = tmp_path / "sound.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
    sound.sample_rate = 8000
    container.mux(stream.encode(sound))
    container.mux(stream.encode())
  assert "sound.mp4" in refusal(capsys, chat(folder, video=path))


def test_a_video_of_one_frame_is_answered(folder, capsys, tmp_path):
  write_dummy_video(tmp_path / "one.mp4", num_frames=1)
  assert chat(folder, video=tmp_path / "one.mp4") == 0
  assert "4 frames seen" in capsys.readouterr().out


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(folder, capsys, question):
  assert "question is empty" in refusal(capsys, chat(folder, question=question))


def test_a_question_in_another_encoding_is_refused_before_the_video_is_encoded(folder, capsys):
  code = chat(folder, question="caf\udce9?", video=folder / "a.mp4")
  output = capsys.readouterr()
  assert (code, output.out) == (2, "")
  assert output.err == "vcflash: --question is not valid UTF-8; write it again\n"


def test_names_and_questions_in_another_encoding_are_no_traceback(folder, capsys, monkeypatch):
  path = folder / os.fsdecode(b"caf\xe9\n.mp4")
  shutil.copy(folder / "a.mp4", path)
  typed = iter(["caf\udce9?", QUESTION, "quit"])
  monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
  assert chat(folder, question=None, video=path) == 0
  first, *others = capsys.readouterr().out.splitlines()
  assert first == rf"{folder}/caf\udce9\n.mp4: 24.0 s, 24 frames seen"
  assert "vcflash: the question is not valid UTF-8 text; write it again" in others


def test_a_question_beyond_the_context_is_refused(folder, capsys):
  assert "context" in refusal(capsys, chat(folder, question="star " * 3000))


def test_an_unknown_model_gets_near_names(folder, capsys):
  assert "did you mean tiny" in refusal(capsys, chat(folder, model="tinny"))
  line = refusal(capsys, chat(folder, model="VideoChat-Flash-Qwen2-7B_res44"))
  assert "VideoChat-Flash-Qwen2-7B_res448" in line


def test_all_tensors_that_do_not_fit_are_listed(folder, capsys, tmp_path):
  shutil.copytree(folder / "model", tmp_path / "model")
  file = tmp_path / "model" / "model.safetensors"
  tensors = load_file(file)
  del tensors["model.norm.weight"]
  tensors["model.surplus"] = np.zeros(2, np.float32)
  tensors["model.mm_projector.mlp.0.bias"] = np.zeros(3, np.float32)
  save_file(tensors, file)
  line = refusal(capsys, chat(folder, model=tmp_path / "model"))
  for name in ("model.norm.weight", "model.surplus", "model.mm_projector.mlp.0.bias", "(3,)"):
    assert name in line


def test_numbers_out_of_range_are_refused(folder, capsys):
  assert "max_frames" in refusal(capsys, chat(folder, "--max-frames", "0"))
  assert "temperature" in refusal(capsys, chat(folder, "--temperature", "-1"))
