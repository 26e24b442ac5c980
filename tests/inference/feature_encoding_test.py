"""Watching with a feature store: the encoder runs once, and answers stay the same."""

import collections
import json
import shutil
import threading

import av
import ml_dtypes
import numpy as np
import pytest

from tests.data.batches.small_mixture import read_rows, write_mixture
from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.mutations import turns
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.features.feature_key import frames_entry
from videochat_flash_jax.data.media import open_source
from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import feature_encoding
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import encode_mixture, open_features
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

QUESTION = "What colour is the star?"
CONFIG = ExampleConfig((4, 32), image_size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def chat(checkpoint, tmp_path_factory):
  return VideoChat.from_pretrained(checkpoint, features=tmp_path_factory.mktemp("features") / "f")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=80, fps=2)


@pytest.fixture
def no_encoder(monkeypatch):
  """From here on nothing is opened as a video, and no encoder runs."""

  def run():
    def fail(*_):
      raise AssertionError("the encoder was run, or a video was opened")

    monkeypatch.setattr(open_source, "open_video", fail)
    monkeypatch.setattr(feature_encoding, "open_row_video", fail)
    monkeypatch.setattr(Engine, "encode_features", fail)
    monkeypatch.setattr(Engine, "encode_groups", fail)

  return run


def test_a_video_watched_before_is_neither_decoded_nor_encoded(
  chat, path, tmp_path, no_encoder, visual_tokens
):
  first = chat.watch(path)
  answer = first.ask(QUESTION, max_new_tokens=12)
  copy = shutil.copy(path, tmp_path / "renamed.mp4")
  no_encoder()
  for seen in (path, copy):
    again = chat.watch(seen)
    assert np.array_equal(visual_tokens(again), visual_tokens(first))
    assert (again.num_frames, again.seconds) == (first.num_frames, first.seconds)
    assert again.ask(QUESTION, max_new_tokens=12) == answer
  with pytest.raises(AssertionError, match="encoder was run"):
    chat.watch(path, max_frames=8)


def test_visual_tokens_are_those_without_a_store_but_for_the_rounding(
  chat, checkpoint, path, visual_tokens
):
  plain = VideoChat.from_pretrained(checkpoint)
  stored, exact = visual_tokens(chat.watch(path)), visual_tokens(plain.watch(path))
  assert stored.shape == exact.shape
  np.testing.assert_allclose(stored, exact, atol=0.02 * np.abs(exact).max())
  clips = np.random.default_rng(0).integers(0, 256, (11, 4, 32, 32, 3), np.uint8)
  features = np.stack(list(chat.engine.encode_features(clips)))
  assert features.dtype == ml_dtypes.bfloat16 and features.shape == (11, 12, 32)


def test_a_folder_of_pictures_and_another_choice_of_frames_are_entries_of_their_own(
  chat, tmp_path, no_encoder
):
  write_mixture(tmp_path, num_videos=1, num_images=8, num_texts=0)
  before = len(chat.features)
  counts = [chat.watch(tmp_path, max_frames=most).num_frames for most in (4, 8)]
  assert len(chat.features) == before + len(set(counts)) == before + 2


def test_a_video_that_ends_early_leaves_nothing_in_the_store(
  chat, path, tmp_path, monkeypatch, visual_tokens
):
  from videochat_flash_jax.data.media.video_reader import VideoReader

  cut, whole, before = (
    shutil.copy(path, tmp_path / "cut.mp4"),
    VideoReader.frames,
    len(chat.features),
  )
  with open(cut, "ab") as file:
    file.write(b"other content")

  def frames(self, *arguments):
    for number, frame in enumerate(whole(self, *arguments)):
      if number == 30:
        raise InputError("the video ends early")
      yield frame

  with monkeypatch.context() as patch:
    patch.setattr(VideoReader, "frames", frames)
    with pytest.raises(InputError, match="ends early"):
      chat.watch(cut)
  assert len(chat.features) == before
  assert np.array_equal(visual_tokens(chat.watch(cut)), visual_tokens(chat.watch(path)))


def test_features_of_another_model_are_refused(chat, tmp_path):
  other = write_dummy_checkpoint(tmp_path / "other", seed=1)
  with pytest.raises(InputError, match="features of another encoder: weights is"):
    VideoChat.from_pretrained(other, features=chat.features.path)
  with pytest.raises(InputError, match="dtype is 'float32' there, here it is 'bfloat16'"):
    VideoChat.from_pretrained(other, "bfloat16", features=chat.features.path)


def test_a_mixture_is_encoded_once_and_a_second_run_goes_on(chat, tmp_path, no_encoder):
  mixture = write_mixture(tmp_path, num_videos=4, num_images=3, num_texts=2)
  (tmp_path / "1.mp4").write_bytes(b"no video")
  rows, config = read_rows(mixture), ExampleConfig((4, 32), image_size=32)
  store = open_features(tmp_path / "features", chat.engine)
  report = encode_mixture(rows, config, chat.engine, store)
  assert (report.rows, report.broken) == (len(rows), 1)
  ((message,),) = report.sources[0].offenders.values()
  assert report.sources[0].broken == {"unreadable video": 1} and message.count("1.mp4") == 1
  assert report.clips > 0
  (tmp_path / "1.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())
  no_encoder()
  again = encode_mixture(rows, config, chat.engine, store)
  assert (again.clips, again.broken) == (0, 0)


def test_what_many_rows_show_is_decoded_once(chat, tmp_path, monkeypatch):
  for number in range(3):
    write_dummy_video(tmp_path / f"{number}.mp4", num_frames=16 + number, fps=2, seed=number)
  (tmp_path / "3.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())  # the same film again
  rows = [
    {"video": f"{number // 30}.mp4", "id": number, "conversations": turns("<image>?", "!")}
    for number in range(120)
  ]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  reads, whole, lock = collections.Counter(), feature_encoding.read_clips, threading.Lock()

  def spy(video, *arguments):
    with lock:
      reads[video.path.name] += 1
      first = reads.total() == 1
    if first and video.path.name == "0.mp4":
      raise BrokenRow("unreadable video", "at first")  # then the others must not trust in it
    return whole(video, *arguments)

  monkeypatch.setattr(feature_encoding, "read_clips", spy)
  monkeypatch.setattr(feature_encoding.os, "cpu_count", lambda: 8)
  store = open_features(tmp_path / "features", chat.engine)
  report = encode_mixture(read_rows(tmp_path / "rows.json"), CONFIG, chat.engine, store)
  assert reads == {"0.mp4": 2, "1.mp4": 1, "2.mp4": 1}
  assert (report.rows, report.broken, len(store)) == (120, 1, 3)


def test_a_damaged_video_is_told_by_the_report_and_wherever_its_features_are_used(chat, tmp_path):
  for name in ("a.mp4", "b.mp4"):
    write_video(tmp_path / name, pictures(40, 32, 32), codec="mpeg4", options={"g": "12"})
  with av.open(str(tmp_path / "b.mp4")) as container:
    places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  data = bytearray((tmp_path / "b.mp4").read_bytes())
  for position, size in places[5:-1]:
    data[position + size // 2 : position + size] = bytes(size - size // 2)
  (tmp_path / "b.mp4").write_bytes(data)
  rows = [{"video": name, "conversations": turns("<image>?", "!")} for name in ("a.mp4", "b.mp4")]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  rows = read_rows(tmp_path / "rows.json")
  store = open_features(tmp_path / "features", chat.engine)
  report = encode_mixture(rows, CONFIG, chat.engine, store)
  assert (report.damaged, report.broken, len(store)) == (1, 0, 2)
  again = open_features(tmp_path / "features", chat.engine)
  read = [read_row_video(rows[number], CONFIG, again) for number in range(2)]
  assert [video.is_damaged for video in read] == [False, True]
  chat.watch(tmp_path / "b.mp4")
  indices = inference_indices(40, 10.0, chat.config.sampling)
  assert chat.features.is_damaged(frames_entry(tmp_path / "b.mp4", indices))


def test_the_command_encodes_and_chats_from_what_it_kept(checkpoint, tmp_path, capsys):
  write_dummy_video(tmp_path / "a.mp4", num_frames=16, fps=2)
  rows = [{"video": name, "conversations": turns("<image>?", "!")} for name in ("a.mp4", "b.mp4")]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  store = str(tmp_path / "features")
  encode = ["data", "encode", str(tmp_path / "rows.json"), "--model", str(checkpoint)]
  encode += ["--out", store, "--frames", "4", "8"]
  for new in (2, 0):
    assert main(encode) == 1
    out = capsys.readouterr().out
    said = f"1 x missing file in {tmp_path / 'rows.json'}\n  {tmp_path / 'b.mp4'}: there is no"
    assert said in out
    assert f"2 row(s) read, {new} new clip(s) and tile(s), 0 damaged" in out
    assert "1 row(s) skipped; 1 entries" in out
  chat = ["chat", "--model", str(checkpoint), "--video", str(tmp_path / "a.mp4")]
  chat += ["--question", QUESTION, "--max-new-tokens", "4", "--features", store]
  answers = []
  for _ in range(2):
    assert main(chat) == 0
    answers.append(capsys.readouterr().out)
  assert answers[0] == answers[1]
  assert main([*encode[:-1], "6"]) == 2
  assert "multiples of 4" in capsys.readouterr().err
