"""Real files, written here: what is read must be what decoding everything gives."""

import gc
import random
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.media.video_files import (
  FILES,
  HEIGHT,
  OPEN_GROUPS,
  SHORT_GROUPS,
  WIDTH,
  decode_everything,
  pictures,
  write_video,
)
from videochat_flash_jax.benchmarks.read_files import frames_needed, write_film
from videochat_flash_jax.data.media import video_decoder
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_decoder import VideoDecoder
from videochat_flash_jax.data.media.video_reader import VideoInfo, open_video
from videochat_flash_jax.errors import InputError


@pytest.mark.parametrize("name", FILES)
def test_every_order_gives_what_decoding_everything_gives(tmp_path, name):
  path = write_video(tmp_path / name, pictures(50), **FILES[name])
  expected = decode_everything(path)
  assert len(expected) == 50
  assert (np.diff(expected.mean(axis=(1, 2, 3))) > 0).all()  # presentation order
  choose = random.Random(0)
  orders = {
    "every frame": range(50),
    "few frames": [3, 4, 20, 21, 37, 49],
    "the last one first": [49, 0, 25, 25, 24],
    "any order": [choose.randrange(50) for _ in range(30)],
  }
  with open_video(path) as video:
    assert video.info.num_frames == 50
    for order, indices in orders.items():
      np.testing.assert_array_equal(video.read(indices), expected[list(indices)], err_msg=order)


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_a_variable_frame_rate_keeps_order_and_length(tmp_path, name):
  stamps = [0, 10, 500, 510, 520, 1300, 1310, 2500, 2900, 2910, 2950, 3000]
  path = write_video(tmp_path / name, pictures(12), stamps=stamps, options=SHORT_GROUPS)
  with open_video(path) as video:
    assert video.info.num_frames == 12
    assert 3.0 <= video.info.seconds <= 3.2
    assert video.info.fps == pytest.approx(12 / video.info.seconds)
    np.testing.assert_array_equal(video.read(range(12)), decode_everything(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [30, Fraction(30000, 1001)])
def test_seconds_are_frames_over_the_declared_rate(tmp_path, suffix, fps):
  path = write_video(tmp_path / f"v.{suffix}", pictures(40), fps=fps)
  with open_video(path) as video:
    assert video.info == VideoInfo(40, float(fps), float(40 / fps), HEIGHT, WIDTH)


def test_far_frames_cost_a_jump_and_not_the_decoding_of_all(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(200), options=SHORT_GROUPS)
  with open_video(path, num_threads=1) as video:
    video.read([0, 65, 66, 199])
    assert video.num_decoded <= 3 * 12
  with open_video(path, num_threads=1) as video:
    video.read(range(200))
    assert video.num_decoded == 200


def test_frames_that_no_other_needs_are_left_out(tmp_path):
  parameters = "keyint=50:min-keyint=50:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"
  options = {"x264-params": parameters}
  path = write_video(tmp_path / "v.mp4", pictures(200), options=options)
  for num_threads in (1, 2):
    with open_video(path, num_threads=num_threads) as video:
      frames = video.read([40, 90, 190], image_size=16)
      np.testing.assert_array_equal(frames, resize(decode_everything(path)[[40, 90, 190]], 16))
      needed, on_the_way = frames_needed(path, np.array([40, 90, 190]))
      assert needed <= video.num_decoded <= needed + 3
      assert needed < on_the_way / 3


def test_frames_asked_for_one_by_one_are_decoded_once(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(60), options={"x264-params": "bframes=3"})
  expected = decode_everything(path)
  with open_video(path) as video:
    for index in [*range(0, 30), *range(30, 60, 4)]:
      np.testing.assert_array_equal(video.read([index])[0], expected[index])
    assert video.num_decoded <= 60


def test_a_file_is_walked_once_unless_it_changes(tmp_path, monkeypatch):
  walks = []
  walk = video_decoder.read_timeline
  monkeypatch.setattr(video_decoder, "read_timeline", lambda *a: walks.append(a) or walk(*a))
  path = write_video(tmp_path / "v.mp4", pictures(3))
  for _ in range(3):
    with open_video(path) as video:
      assert video.read([2, 0]).shape == (2, HEIGHT, WIDTH, 3)
  assert len(walks) == 1
  write_video(path, pictures(7))
  with open_video(path) as video:
    assert video.info.num_frames == 7


def test_reading_may_stop_anywhere_and_go_on_elsewhere(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(60), options=SHORT_GROUPS)
  expected = decode_everything(path)
  for image_size in (None, (HEIGHT, WIDTH)):
    with open_video(path, num_threads=2) as video:
      for start in (0, 7, 30):
        frames = video.frames([start, start + 5, start + 20, 59], image_size)
        np.testing.assert_array_equal(next(frames), expected[start])
        other = video.frames([start + 2, start + 3], image_size)
        np.testing.assert_array_equal(next(other), expected[start + 2])
        frames.close()
        other.close()


def test_a_video_of_one_frame_can_be_read_repeatedly(tmp_path):
  for name in ("one.mp4", "one.webm", "one.gif"):
    settings = {"one.webm": FILES["vp9.webm"], "one.gif": FILES["picture.gif"]}.get(name, {})
    path = write_video(tmp_path / name, pictures(1), **settings)
    with open_video(path) as video:
      assert video.info.num_frames == 1
      assert video.info.seconds > 0
      frames = video.read([0, 0, 0, 0])
    np.testing.assert_array_equal(frames, np.repeat(decode_everything(path), 4, axis=0))


def test_frames_are_decoded_as_they_are_asked_for_and_resized_at_once(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(10))
  expected = decode_everything(path)
  with open_video(path) as video:
    frames = video.frames(np.array([1, 5, 9]), image_size=32)
    np.testing.assert_array_equal(next(frames), resize(expected[1], 32))
    assert video.read([2], image_size=(16, 20)).shape == (1, 16, 20, 3)
    np.testing.assert_array_equal(next(frames), resize(expected[5], 32))


def test_frames_cut_by_an_edit_list_are_not_part_of_the_video(tmp_path):
  whole = write_video(tmp_path / "whole.mp4", pictures(40), options=OPEN_GROUPS)
  path = tmp_path / "cut.mp4"
  with av.open(str(whole)) as source, av.open(str(path), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(video=0):
      if packet.size:
        shift = 15 * packet.duration
        packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
        target.mux(packet)
  with open_video(path) as video:
    assert video.info.num_frames == 25
    np.testing.assert_array_equal(video.read(range(25)), decode_everything(whole)[15:])
    np.testing.assert_array_equal(video.read([24, 0]), decode_everything(whole)[[39, 15]])


# The matrix of a phone held upright: columns (0, 1), (-1, 0), in fixed point with 16 and 30 bits.
UPRIGHT = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
PLAIN = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()


def test_a_rotated_video_is_turned_as_players_do(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(2))
  expected = decode_everything(path)
  data = path.read_bytes()
  track = data.index(b"tkhd")
  path.write_bytes(data[:track] + data[track:].replace(PLAIN, UPRIGHT, 1))
  with open_video(path) as video:
    assert (video.info.height, video.info.width) == (WIDTH, HEIGHT)
    clockwise = np.rot90(expected, -1, axes=(1, 2))
    np.testing.assert_array_equal(video.read([0, 1]), clockwise)


def test_a_folder_of_pictures_is_read_in_natural_order(tmp_path):
  frames = pictures(12)
  for number, frame in enumerate(frames):
    Image.fromarray(frame).save(tmp_path / f"shot_{number}.png")
  (tmp_path / "notes.txt").write_text("no picture")
  with open_video(tmp_path) as video:
    assert video.info == VideoInfo(12, 1.0, 12.0, HEIGHT, WIDTH)
    np.testing.assert_array_equal(video.read([0, 2, 10, 11, 1]), frames[[0, 2, 10, 11, 1]])
  with open_video(tmp_path, picture_fps=3.0) as video:
    assert video.info == VideoInfo(12, 3.0, 4.0, HEIGHT, WIDTH)


def test_pictures_become_rgb_and_may_differ_in_size_when_resized(tmp_path):
  Image.new("L", (20, 10), 100).save(tmp_path / "1.JPG")
  Image.new("RGB", (30, 40), (9, 9, 9)).save(tmp_path / "2.jpeg")
  with open_video(tmp_path) as video:
    frames = video.read([0, 1], image_size=8)
    assert frames[0].tolist() == np.full((8, 8, 3), 100).tolist()
    with pytest.raises(InputError, match="frame 1 is 30x40, the first one is 20x10"):
      video.read([0, 1])


def test_hidden_files_of_a_folder_are_no_frames(tmp_path):
  frames = pictures(3)
  for number, frame in enumerate(frames):
    Image.fromarray(frame).save(tmp_path / f"{number}.png")
    (tmp_path / f"._{number}.png").write_bytes(b"no picture")
  (tmp_path / ".DS_Store").write_bytes(b"no picture")
  with open_video(tmp_path) as video:
    np.testing.assert_array_equal(video.read(range(video.info.num_frames)), frames)


def test_pictures_of_a_folder_are_shown_as_single_images_are(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(pictures(1)[0]).save(tmp_path / "1.png", exif=exif)
  Image.fromarray(np.full((WIDTH, HEIGHT), 0x8000, np.uint16)).save(tmp_path / "2.png")
  with open_video(tmp_path) as video:
    turned, gray = video.read([0, 1])
  np.testing.assert_array_equal(turned, np.rot90(pictures(1)[0], -1))
  assert (gray == 128).all()


def test_a_name_with_a_colon_is_a_file(tmp_path):
  path = write_video(tmp_path / "http: part 1.mp4", pictures(3))
  with open_video(path) as video:
    assert video.info.num_frames == 3


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path):
  path = tmp_path / "v.mkv"
  write_video(path, pictures(3), title="caf\u00e9")
  data = path.read_bytes()
  assert "caf\u00e9".encode() in data
  path.write_bytes(data.replace("caf\u00e9".encode(), b"caf\xe9\xe9"))
  with open_video(path) as video:
    assert video.info.num_frames == 3


def test_a_frame_that_does_not_exist_is_an_index_error(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(3))
  with open_video(path) as video:
    for index in (-1, 3):
      with pytest.raises(IndexError):
        video.read([index])


PRINT_GROWTH = """
import resource, sys
from videochat_flash_jax.data.media.video_reader import open_video
with open_video(sys.argv[1]) as video:
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  frames = video.read(range(video.info.num_frames), image_size=32)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(frames), (after - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
def test_eight_seconds_of_4k_are_read_without_holding_4k_frames(tmp_path):
  height, width, fps = 2160, 3840, 5
  small = pictures(2, height // 80, width // 80)
  two = small.repeat(80, axis=1).repeat(80, axis=2)
  frames = [two[0]] * 4 * fps + [two[1]] * 4 * fps
  options = {"preset": "ultrafast", "tune": "zerolatency"}
  path = write_video(tmp_path / "4k.mp4", frames, fps=fps, options=options)
  with open_video(path) as video:
    assert video.info == VideoInfo(40, 5.0, 8.0, height, width)
  # A process's peak starts at the size of the one that started it, so a small one stands between.
  starter = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
  command = [sys.executable, "-c", starter, sys.executable, "-c", PRINT_GROWTH, str(path)]
  output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  num_frames, grown_bytes = map(int, output.split())
  assert num_frames == 40
  assert grown_bytes < 10 * height * width * 3  # all frames at once would be 40


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  path = tmp_path_factory.mktemp("film") / "film.mp4"
  write_film(path, 500, 96, 128, key_frame_distance=50)
  return path


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("spacing", [2, 3, 4, 5, 8, 16])
def test_few_more_frames_are_decoded_than_must_be(film, spacing, num_threads):
  indices = np.arange(0, 500, spacing)
  with open_video(film, num_threads=num_threads) as video:
    frames = video.read(indices, 64)
    num_decoded = video.num_decoded
  assert num_decoded <= 1.1 * frames_needed(film, indices)[0]
  with open_video(film, num_threads=1) as video:
    np.testing.assert_array_equal(frames, video.read(np.arange(500), 64)[indices])


def test_a_closed_decoder_is_freed_at_once(film):
  decoder = VideoDecoder(film, num_threads=1)
  assert len(list(decoder.read([3, 17]))) == 2
  alive = weakref.ref(decoder)
  decoder.close()
  gc.disable()
  try:
    del decoder
    assert alive() is None
  finally:
    gc.enable()
