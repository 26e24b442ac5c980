"""`vcflash chat`, and what it says to bad input: one line, exit code 2, nothing else."""

import io
import os
import re
import shutil
import signal

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference import fitting, programs
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
  output = capsys.readouterr()
  assert output.err == "a.mp4: 24.0 s, 8 frames, one every 3 s\n"
  assert len(output.out) > 1 and "a.mp4" not in output.out


def test_weights_may_be_int8_and_nothing_else(folder, capsys):
  assert chat(folder, "--max-frames", "4", "--weights", "int8") == 0
  line = refusal(capsys, chat(folder, "--weights", "int4"))
  assert "argument --weights: invalid choice: 'int4'" in line and "int8" in line


def test_images_are_looked_at(folder, capsys, tmp_path):
  paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
  for path in paths:
    Image.new("RGB", (64, 32), "red").save(path)
  assert chat(folder, images=paths[:1]) == 0
  assert chat(folder, images=paths) == 0
  assert capsys.readouterr().err.splitlines() == [
    f"{paths[0]}: 1 image in 3 tiles", f"{paths[0]}, {paths[1]}: 2 images in 2 tiles"
  ]  # fmt: skip


@pytest.mark.parametrize(
  "options, said",
  [
    (["--tensor", "0"], "--tensor is 0; give at least 1"),
    (["--tensor", "7"], "--tensor 7 x --sequence 1 does not divide"),
    (["--dropout"], "--dropout drops tokens at layers 4 and 18, but .* has 3 layers; leave it out"),
  ],
)
def test_settings_that_the_model_cannot_have_are_refused(folder, capsys, options, said):
  assert re.search(said, refusal(capsys, chat(folder, *options)))


def test_images_are_not_refused_for_the_memory_of_a_video(folder, capsys, tmp_path, monkeypatch):
  config, _ = fitting.sizes_of(str(folder / "model"))
  needs = fitting.Fitting(config, "float32").needs(config.vision.clip_frames, fitting.Setting())
  monkeypatch.setattr(fitting, "device_memory", lambda: needs.total)
  Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
  assert chat(folder, images=[tmp_path / "a.png"]) == 0
  assert "give" in refusal(capsys, chat(folder, "--max-frames", "512000"))


def test_videos_and_images_are_asked_about_together(folder, capsys, tmp_path):
  Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
  more = ["--video", str(folder / "a.mp4"), "--image", str(tmp_path / "a.png")]
  assert chat(folder, *more, "--max-frames", "8") == 0
  assert len(capsys.readouterr().err.splitlines()) == 3
  line = refusal(capsys, main(["chat", "--model", "tiny", "--question", QUESTION]))
  assert "give --video or --image" in line


def test_files_are_checked_before_a_model_is_loaded(folder, capsys, tmp_path, monkeypatch):
  monkeypatch.setattr("videochat_flash_jax.inference.chat.VideoChat.from_pretrained", None)
  Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
  for options, said in (
    (["--video", "none.mp4"], "none.mp4: there is no such"),
    (["--image", "none.png"], "none.png: there is no such"),
    (["--video", str(tmp_path / "a.png")], "a.png: a picture, not a video"),
    (["--end", "-1"], "end is -1"),
    (["--start", "99"], "start is 99: the video ends at 24.00 s"),
    (["--fps", "0"], "fps is 0"),
  ):
    assert said in refusal(capsys, chat(folder, *options))


def test_frames_of_images_cannot_be_counted(folder, capsys):
  line = refusal(capsys, chat(folder, "--max-frames", "8", images=["a.png"]))
  assert "--max-frames counts frames of a video" in line


def test_a_missing_image_is_named(folder, capsys):
  assert "nothing.png" in refusal(capsys, chat(folder, images=["nothing.png"]))


def test_a_video_is_no_image(folder, capsys):
  line = refusal(capsys, chat(folder, images=[folder / "a.mp4"]))
  assert "a.mp4: not a readable picture" in line


def test_without_a_question_a_prompt_asks_until_told_to_quit(folder, capsys, monkeypatch):
  typed = io.StringIO("\n".join([QUESTION, "star " * 3000, "", "And then?", "quit", "not read"]))
  monkeypatch.setattr("sys.stdin", typed)
  assert chat(folder, question=None) == 0
  assert "context" in capsys.readouterr().err
  assert typed.read() == "not read"  # the question that is too long did not end the conversation


def test_commands_of_the_prompt(folder, capsys, tmp_path, monkeypatch):
  Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
  commands = (
    f"/help\n/video {folder}/a.mp4\n/image {tmp_path}/a.png\n/frames\n/video none\n/reset\n"
  )
  monkeypatch.setattr("sys.stdin", io.StringIO(commands))
  assert chat(folder, "--max-frames", "4", question=None) == 0
  output = capsys.readouterr()
  assert output.out == ""
  for said in (
    "/reset",
    "  at 2.9, 8.9, 14.9, 20.9 s",
    "none: there is no such",
    "a new conversat",
  ):
    assert said in output.err
  assert output.err.count("a.mp4: 24.0 s, 4 frames, one every 6 s") == 4


def test_ctrl_c_stops_an_answer_and_the_prompt_goes_on(folder, capsys, monkeypatch):
  decode, pressed = programs.decode, []

  def with_ctrl_c(*arguments):
    result = decode(*arguments)
    if not pressed:
      pressed.append(True)
      os.kill(os.getpid(), signal.SIGINT)
    return result

  monkeypatch.setattr(programs, "decode", with_ctrl_c)
  monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n/frames\n{QUESTION}\n"))
  # A process that was started in the background ignores the signal.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    assert chat(folder, "--max-frames", "4", question=None) == 0
  finally:
    signal.signal(signal.SIGINT, before)
  output = capsys.readouterr()
  _, stopped, later = output.err.partition("(stopped)\n")
  assert stopped and "4 frames, one every 6 s" in later
  assert chat(folder, "--max-frames", "4") == 0
  assert output.out.strip() == capsys.readouterr().out.strip()


def test_a_prompt_without_input_ends_or_is_refused(folder, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO(""))
  assert chat(folder, question=None) == 0
  monkeypatch.setattr("sys.stdin", None)
  assert "give --question" in refusal(capsys, chat(folder, question=None))


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
  assert "one.mp4: 0.5 s, 1 frame\n" in capsys.readouterr().err


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
  monkeypatch.setattr("sys.stdin", io.StringIO(f"caf\udce9?\n{QUESTION}\n"))
  assert chat(folder, question=None, video=path) == 0
  first, *others = capsys.readouterr().err.splitlines()
  assert first == r"caf\udce9\n.mp4: 24.0 s, 24 frames, one every 1 s"
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


@pytest.mark.parametrize("flag", ["--tensor", "--sequence"])
def test_a_number_of_devices_that_cannot_be_is_refused(folder, capsys, flag):
  assert refusal(capsys, chat(folder, flag, "0")) == f"vcflash: {flag} is 0; give at least 1"
  line = refusal(capsys, chat(folder, flag, "5"))
  assert f"{flag} 5" in line and re.search(r"does not divide the \d+ devices here; change", line)


def test_numbers_out_of_range_are_refused(folder, capsys):
  assert "max_frames" in refusal(capsys, chat(folder, "--max-frames", "0"))
  assert "temperature" in refusal(capsys, chat(folder, "--temperature", "-1"))
