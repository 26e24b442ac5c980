"""Files that are no video, or not a whole one: one clear line each."""

import os

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.media.video_files import FILES, HEIGHT, SHORT_GROUPS, WIDTH, pictures, write_video
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError


def text_file(path):
  path.write_text("This is not a video.\n" * 100)


def empty_file(path):
  path.write_bytes(b"")


def cut_before_the_index(path):
  data = write_video(path, pictures(40)).read_bytes()
  path.write_bytes(data[: len(data) // 2])


def cut_after_the_index(path):
  data = write_video(path, pictures(40), muxer={"movflags": "faststart"}).read_bytes()
  path.write_bytes(data[: len(data) // 2])


def index_only(path):
  data = write_video(path, pictures(40), muxer={"movflags": "faststart"}).read_bytes()
  with av.open(str(path)) as container:
    first = next(container.demux(video=0))
  path.write_bytes(data[: first.pos])


def header_only(path):
  with av.open(str(path), "w", format="matroska") as container:
    container.add_stream("libx264", rate=10).pix_fmt = "yuv420p"
    container.start_encoding()


def add_sound(container):
  stream = container.add_stream("libmp3lame", rate=16000)
  silence = np.zeros((1, 16000), np.float32)
  frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
  frame.sample_rate = 16000
  return lambda: container.mux([*stream.encode(frame), *stream.encode(None)])


def audio_only(path):
  with av.open(str(path), "w") as container:
    add_sound(container)()


def audio_with_a_cover_picture(path):
  with av.open(str(path), "w", format="mp3") as container:
    write_sound = add_sound(container)
    stream = container.add_stream("mjpeg", rate=1)
    stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    picture = av.VideoFrame.from_ndarray(pictures(1)[0]).reformat(format="yuvj420p")
    container.mux([*stream.encode(picture), *stream.encode(None)])
    write_sound()


def unknown_codec(path):
  data = write_video(path.with_suffix(".mkv"), pictures(4)).read_bytes()
  assert b"V_MPEG4/ISO/AVC" in data
  path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))


def folder_without_pictures(path):
  path.mkdir()
  (path / "notes.txt").write_text("no picture")


def folder_of_a_broken_picture(path):
  path.mkdir()
  (path / "1.png").write_text("no picture")


def headers_only_of(name, codec):
  def write(path):
    with av.open(str(path), "w", format=name) as container:
      stream = container.add_stream(codec, rate=10)
      stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
      container.start_encoding()
      container.mux(stream.encode(None))

  return write


BAD_INPUT = [
  (headers_only_of("mp4", "libx264"), "no video frames"),
  (headers_only_of("webm", "libvpx-vp9"), "no video frames"),
  (headers_only_of("avi", "mpeg4"), "no video frames"),
  (lambda path: None, "there is no such video"),
  (text_file, "not a video"),
  (empty_file, "the file is empty"),
  (cut_before_the_index, "not a video, or its end with the index is missing"),
  (cut_after_the_index, r"truncated .* of its 40 frames can be"),
  (index_only, "no video frames"),
  (header_only, "no video frames"),
  (audio_only, "audio only"),
  (audio_with_a_cover_picture, "audio only"),
  (unknown_codec, "codec of its video is not supported"),
  (folder_without_pictures, r"no \.jpg or \.png"),
  (folder_of_a_broken_picture, "not a readable picture"),
]


@pytest.mark.parametrize("write, message", BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_file_and_a_remedy(tmp_path, capfd, write, message):
  path = tmp_path / "bad.mp4"
  write(path)
  capfd.readouterr()
  with pytest.raises(InputError, match=message) as error:
    open_video(path)
  text = str(error.value)
  assert str(path) in text
  assert "\n" not in text
  assert "; " in text  # before the remedy
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [index_only, header_only, headers_only_of("mp4", "mpeg4")])
def test_a_video_without_a_frame_breaks_its_row_for_that_reason(tmp_path, write):
  write(tmp_path / "bad.mp4")
  with pytest.raises(BrokenRow) as error:
    read_row_video({"video": str(tmp_path / "bad.mp4")}, ExampleConfig(image_size=32))
  assert error.value.reason == "no frames"


@pytest.mark.parametrize(
  "end, message", [(1000, "8 s to 1000 s ends long after"), (11.1, "long after")]
)
def test_a_clip_that_ends_far_beyond_its_video_is_refused(tmp_path, end, message):
  path = write_video(tmp_path / "v.mp4", pictures(100), codec="mpeg4")  # 10 s
  row = {"video": str(path), "start": 8}
  with pytest.raises(BrokenRow, match=f"^bad times: .*{message}"):
    read_row_video(row | {"end": end}, ExampleConfig(image_size=32))
  video = read_row_video(row | {"end": 10.9}, ExampleConfig(image_size=32))
  assert video.seconds == pytest.approx(2.9) and max(video.frame_seconds) < 2


@pytest.mark.parametrize("has_timeline", [False, True])
def test_a_file_that_cannot_be_opened_is_not_held_open(tmp_path, has_timeline):
  path = tmp_path / ("v.mp4" if has_timeline else "v.mkv")
  write_video(path, pictures(8), codec="mjpeg", pixels="yuvj420p")
  data = bytearray(path.read_bytes())
  if has_timeline:  # but not a frame that could be decoded
    start = data.index(b"mdat") + 4
    stop = data.index(b"moov") - 4
    data[start:stop] = bytes(stop - start)
  path.write_bytes(data if has_timeline else data[: len(data) // 2])
  before, errors = len(os.listdir("/proc/self/fd")), []
  for _ in range(3):
    try:
      open_video(path)
    except InputError as error:
      errors.append(error)  # its traceback knows the decoder
  assert len(errors) == 3
  assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
  "name, value",
  [
    *(("picture_fps", value) for value in (0.0, -1, "1", True, float("nan"), float("inf"))),
    *(("num_threads", value) for value in (0, -1, 1.5, "2", True)),
  ],
)
def test_arguments_of_another_type_are_refused_by_name(tmp_path, name, value):
  Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
  with pytest.raises(InputError, match=f"^{name} is "):
    open_video(tmp_path, **{name: value})


@pytest.mark.parametrize("size", [0, -1, 1.5, "224", True, (1,), (8, 0), (8, 8, 3), 10**7])
def test_an_image_size_that_cannot_be_is_refused(tmp_path, size):
  Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
  with open_video(tmp_path) as video:
    for indices in ([0], []):
      with pytest.raises(InputError, match=r"^image_size is .*pixels, from 1 to 32768"):
        video.read(indices, size)


@pytest.mark.parametrize("index", ["a", None, 0.5, True])
def test_a_frame_that_is_no_number_is_refused(tmp_path, index):
  Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
  with open_video(tmp_path) as video, pytest.raises(InputError, match=r"^index of a frame is "):
    video.read([index])


def test_no_frames_at_all_may_be_read(tmp_path):
  Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
  with open_video(tmp_path, num_threads=np.int64(2)) as video:
    assert video.read([]).shape == (0, 6, 8, 3)
    assert video.read([], np.int64(16)).shape == (0, 16, 16, 3)
    assert video.read(np.zeros(1, np.int32), [16, 4]).shape == (1, 16, 4, 3)


def test_a_truncated_mp4_names_how_many_frames_are_left(tmp_path):
  path = tmp_path / "v.mp4"
  frames = pictures(40)
  whole = write_video(path, frames, muxer={"movflags": "faststart"}).read_bytes()
  with av.open(str(path)) as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
  path.write_bytes(whole[: packets[31].pos - 1])
  with pytest.raises(InputError, match="only 30 of its 40 frames can be read"):
    open_video(path)


@pytest.mark.parametrize("name", ["b_frames.mkv", "vp9.webm"])
def test_a_truncated_matroska_file_is_noticed_by_its_length(tmp_path, name):
  path = write_video(tmp_path / name, pictures(40), **FILES[name])
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(InputError, match=r"truncated .* of its \d+ frames"):
    open_video(path)


def test_a_damaged_end_is_noticed_when_it_is_reached(tmp_path):
  path = write_video(tmp_path / "v.mp4", pictures(40), options=SHORT_GROUPS)
  with av.open(str(path)) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  data = bytearray(path.read_bytes())
  for position, size in packets[24:]:
    data[position : position + size] = bytes(size)
  path.write_bytes(data)
  with open_video(path) as video:
    assert video.read(range(20)).shape[0] == 20
    with pytest.raises(InputError, match=r"only 2\d of its 40 frames can be read"):
      video.read([39])


@pytest.mark.parametrize(
  "path, message",
  [
    ("", "'' is not a path; "),
    (None, "None is not a path; "),
    (bytes(10_000), r"^b'\\x00.{,100} is not a path; [a-z ]+$"),
    ("nonsense://example.org/a.mp4", "nonsense:// is an unknown protocol"),
    ("a" * 300 + ".mp4", "there is no such video"),
    ("a\0b", "there is no such video"),
  ],
)
def test_a_path_that_no_file_can_have_is_refused(path, message):
  with pytest.raises(InputError, match=message):
    open_video(path)


def test_a_frame_that_the_decoder_gives_up_on_is_refused_by_number(tmp_path):
  path = write_video(tmp_path / "v.gif", pictures(8), **FILES["picture.gif"])
  data = bytearray(path.read_bytes())
  with av.open(str(path)) as container:
    packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][5]
  picture = data.index(packet) + packet.index(b"\x2c", 8)  # past the eight bytes of its timing
  flags = data[picture + 9]
  palette_size = 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0
  data[picture + 10 + palette_size] = 99  # bits of a code, at most 12
  path.write_bytes(data)
  with open_video(path) as video:
    assert video.read(range(5)).shape[0] == 5
    with pytest.raises(InputError, match=r"v\.gif: frame 5 cannot be decoded .*; copy"):
      video.read([5])


def test_frames_that_stand_in_for_damaged_ones_are_told_once(tmp_path, caplog):
  path = write_video(tmp_path / "v.mp4", pictures(40), options=SHORT_GROUPS)
  with open_video(path) as video:
    video.read(range(40))
  assert not caplog.records
  with av.open(str(path)) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  data = bytearray(path.read_bytes())
  for position, size in packets[14:16] + packets[28:30]:
    data[position : position + size] = bytes(size)
  path.write_bytes(data)
  with open_video(path) as video:
    assert video.read(range(38)).shape[0] == 38
    video.read([0, 20])
    assert video.damaged
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert str(path) in record.getMessage()


def test_frames_that_the_decoder_patched_up_are_told(tmp_path, caplog):
  path = write_video(tmp_path / "v.mp4", pictures(40), codec="mpeg4", options={"g": "12"})
  with av.open(str(path)) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  position, size = packets[30]
  data = bytearray(path.read_bytes())
  data[position + size // 2 : position + size] = bytes(size - size // 2)
  path.write_bytes(data)
  with open_video(path) as video:
    video.read([0, 20])
    assert not video.damaged
    video.read([0, 30])
    assert video.damaged
  assert "some frames are repaired" in caplog.text
