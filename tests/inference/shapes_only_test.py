"""The tiny model says what it knows, before it answers about anything else.

The other tests show that other models say nothing: there a warning is an error.
"""

import shutil
import warnings

import numpy as np
import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.synthetic.world import draw_scene, is_synthetic, write_video
from videochat_flash_jax.testing.dummy import write_dummy_video

SAID = "knows the coloured things"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("films")
  write_video(draw_scene(np.random.default_rng(0), 8), folder / "synthetic.mp4")
  write_dummy_video(folder / "real.mp4")
  return folder


@pytest.fixture(scope="module")
def tiny():
  return VideoChat.from_pretrained("tiny")


def test_a_synthetic_film_is_known_by_its_file(folder, tmp_path):
  film = folder / "synthetic.mp4"
  assert is_synthetic(film) and is_synthetic(film.as_uri())
  shutil.copy(film, tmp_path / "renamed.mp4")
  assert is_synthetic(tmp_path / "renamed.mp4")
  assert not is_synthetic(folder / "real.mp4")
  assert not is_synthetic(folder) and not is_synthetic(folder / "missing.mp4")


def test_a_real_film_or_picture_gets_a_warning(tiny, folder):
  with pytest.warns(UserWarning, match=SAID):
    tiny.watch(folder / "real.mp4")
  with pytest.warns(UserWarning, match=SAID):
    tiny.look(np.zeros((8, 8, 3), np.uint8))


def test_a_synthetic_film_gets_none(tiny, folder):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tiny.watch(folder / "synthetic.mp4")


def test_the_command_line_says_it_once(folder, capsys):
  films = ["--video", str(folder / "real.mp4"), "--video", str(folder / "real.mp4")]
  with warnings.catch_warnings():
    warnings.simplefilter("default")
    assert main(["chat", *films, "-q", "What colour is the star?"]) == 0
  output = capsys.readouterr()
  assert output.err.count(SAID) == 1 and "VideoChat-Flash-Qwen2_5-2B_res448" in output.err
  assert len(output.out.splitlines()) == 1
