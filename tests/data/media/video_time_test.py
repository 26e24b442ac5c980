"""Lengths and frames where stamps are uneven, repeated, mixed up, missing, or start anew."""

import itertools
import random
from fractions import Fraction

import av
import pytest

from tests.data.media.numbered_videos import (
  MPEG2,
  NO_B_FRAMES,
  OPEN_GROUPS,
  SHORT_GROUPS,
  VPX,
  number_shown,
  write_numbers,
)
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.errors import InputError


def assert_shows(path, numbers, seconds: float):
  """Asserts length and frames: sparsely from several decoders, then in order, then backwards."""
  numbers, every = list(numbers), range(len(numbers))
  with open_video(path) as video:
    assert video.info.num_frames == len(numbers)
    assert video.info.seconds == pytest.approx(seconds, abs=0.1)
    few = list(every[:: max(1, len(numbers) // 7)])
    for order, size in ((few, 32), (every, None), (few[::-1], None)):
      shown = [number_shown(frame) for frame in video.frames(order, size)]
      assert shown == [numbers[index] for index in order]
    assert not video.damaged


def uneven(num_frames: int) -> list[int]:
  choose = random.Random(3)
  steps = [choose.choice([16, 33, 50, 70]) for _ in range(num_frames - 1)]
  return list(itertools.accumulate(steps, initial=0))


def without_durations(packets):
  for packet in packets:
    packet.duration = 0


@pytest.mark.parametrize(
  "name, file_format, codec, options",
  [
    ("a.webm", "webm", "libvpx", VPX),
    ("a.mkv", "matroska", "libx264", SHORT_GROUPS),
    ("a.flv", "flv", "libx264", SHORT_GROUPS),
    ("a.mp4", "mp4", "libx264", SHORT_GROUPS),
    ("a.ts", "mpegts", "libx264", SHORT_GROUPS),
  ],
)
def test_an_uneven_rate_is_measured_by_its_stamps(tmp_path, name, file_format, codec, options):
  stamps = uneven(100)
  path = write_numbers(
    tmp_path / name, range(100), file_format, codec, options,
    milliseconds=stamps, change=without_durations,
  )  # fmt: skip
  assert_shows(path, range(100), (stamps[-1] + 42) / 1000)


@pytest.mark.parametrize(
  "name, codec, options",
  [
    ("a.webm", "libvpx", VPX),
    ("a.mkv", "libx264", NO_B_FRAMES),
    ("b.mkv", "libx264", SHORT_GROUPS),
  ],
)
def test_a_repeated_stamp_costs_neither_order_nor_length(tmp_path, name, codec, options):
  def repeat(packets):
    in_order = sorted(packets, key=lambda packet: packet.pts)
    for index in (31, 62):
      in_order[index].pts = in_order[index - 1].pts
    if options is not SHORT_GROUPS:
      for packet in packets:
        packet.dts = packet.pts

  stamps = uneven(100)
  path = write_numbers(
    tmp_path / name, range(100), "matroska", codec, options, milliseconds=stamps, change=repeat
  )
  assert_shows(path, range(100), (stamps[-1] + 42) / 1000)
  if codec == "libx264":  # whose groups are short
    with open_video(path, num_threads=1) as video:
      assert number_shown(video.read([95])[0]) == 95
      assert video.num_decoded < 25  # the first frame, and those after a jump


def swap_stamps(path, pairs):
  """Swaps the stamps of packets: two bytes, one byte before the data of a block of Matroska."""
  data, places = bytearray(path.read_bytes()), []
  with av.open(str(path)) as container:
    for packet in container.demux(video=0):
      if packet.size:
        places.append(data.index(bytes(packet), packet.pos) - 3)
  for first, second in pairs:
    one, other = (slice(places[index], places[index] + 2) for index in (first, second))
    data[one], data[other] = data[other], data[one]
  path.write_bytes(data)


@pytest.mark.parametrize(
  "codec, options, pixels",
  [
    ("libvpx", VPX, "yuv420p"),
    ("libx264", NO_B_FRAMES, "yuv420p"),
    ("mjpeg", {}, "yuvj420p"),
  ],
)
def test_frames_with_mixed_up_stamps_are_shown_by_their_stamps(tmp_path, codec, options, pixels):
  stamps = uneven(60)
  path = write_numbers(
    tmp_path / "a.mkv", range(60), "matroska", codec, options, milliseconds=stamps, pixels=pixels
  )
  swap_stamps(path, [(5, 6), (30, 33)])
  numbers = list(range(60))
  numbers[5], numbers[6], numbers[30], numbers[33] = 6, 5, 33, 30
  assert_shows(path, numbers, (stamps[-1] + 42) / 1000)


JOINED = {
  "late then early": (100, 0),
  "early then late": (0, 100),
  "three times the same": (0, 0, 0),
}


def join(path, parts, *arguments, **settings):
  """Writes recordings, one behind the other, into one file; returns the numbers they show."""
  joined, numbers = b"", []
  for part, first in parts:
    recording = write_numbers(path.with_suffix(".part"), part, *arguments, first=first, **settings)
    joined, numbers = joined + recording.read_bytes(), [*numbers, *part]
  path.write_bytes(joined)
  return numbers


@pytest.mark.parametrize("has_sound", [False, True])
@pytest.mark.parametrize("order", JOINED)
@pytest.mark.parametrize(
  "file_format, codec, options",
  [
    ("mpegts", "libx264", SHORT_GROUPS),
    ("mpegts", "libx264", OPEN_GROUPS),
    ("mpegts", "mpeg2video", MPEG2),
    ("vob", "mpeg2video", MPEG2),
  ],
)
def test_joined_broadcasts_are_shown_one_after_the_other(
  tmp_path, order, file_format, codec, options, has_sound
):
  parts = [(range(first, first + 50), 20 * first) for first in JOINED[order]]
  settings = {"size": 96, "has_sound": has_sound}
  numbers = join(tmp_path / "a", parts, file_format, codec, options, **settings)
  assert_shows(tmp_path / "a", numbers, len(numbers) / 25)


def test_a_stamp_of_the_next_recording_moves_no_frame(tmp_path):
  parts = [(range(40), 100_000), (range(40, 70), 50), (range(70, 100), 300_000)]
  numbers = join(tmp_path / "a", parts, "mpeg", "mpeg1video", MPEG2, has_sound=True)
  assert_shows(tmp_path / "a", numbers, 4)


def test_a_broadcast_of_few_frames_is_shown_in_order(tmp_path):
  fps = Fraction(1, 20)
  path = write_numbers(tmp_path / "a.ts", range(60), "mpegts", "libx264", OPEN_GROUPS, fps=fps)
  assert_shows(path, range(60), 1200)


@pytest.mark.parametrize(
  "codec, options",
  [("libx264", OPEN_GROUPS), ("libx264", SHORT_GROUPS), ("mpeg2video", MPEG2)],
)
def test_an_asf_with_b_frames_is_shown_in_order(tmp_path, codec, options):
  path = write_numbers(tmp_path / "a.wmv", range(60), "asf", codec, options)
  assert_shows(path, range(60), 2.4)


@pytest.mark.parametrize("live", ["0", "1"])
@pytest.mark.parametrize("codec, options", [("libvpx", VPX), ("libx264", SHORT_GROUPS)])
def test_joined_recordings_of_a_browser_are_shown_one_after_the_other(
  tmp_path, codec, options, live
):
  parts = [(range(50), 0), (range(100, 130), 0)]
  numbers = join(tmp_path / "a", parts, "matroska", codec, options, muxer={"live": live})
  assert_shows(tmp_path / "a", numbers, 3.2)


@pytest.mark.parametrize("file_format, codec", [("vob", "mpeg2video"), ("mpeg", "mpeg1video")])
@pytest.mark.parametrize("options", [MPEG2, {"bf": "0", "g": "8"}, {"bf": "1", "g": "30"}])
@pytest.mark.parametrize("size", [64, 256])
def test_frames_of_a_program_stream_are_right_after_a_jump(
  tmp_path, file_format, codec, options, size
):
  path = write_numbers(tmp_path / "a.mpg", range(150), file_format, codec, options, size=size)
  assert_shows(path, range(150), 6)


@pytest.mark.parametrize(
  "file_format, codec, options, fps",
  [
    ("h264", "libx264", SHORT_GROUPS, 10),
    ("h264", "libx264", OPEN_GROUPS, 30),
    ("hevc", "libx265", {"x265-params": "log-level=none:keyint=12:pools=none"}, 50),
    ("mpeg1video", "mpeg1video", MPEG2, 25),
    ("mpeg2video", "mpeg2video", MPEG2, 25),
    ("m4v", "mpeg4", MPEG2, 10),
    ("ivf", "libvpx", VPX, 10),
  ],
)
def test_a_bare_stream_is_as_long_as_its_frames(tmp_path, file_format, codec, options, fps):
  path = write_numbers(tmp_path / "a", range(60), file_format, codec, options, fps=fps)
  assert_shows(path, range(60), 60 / fps)


@pytest.mark.parametrize("codec, options", [("mpeg4", MPEG2), ("libx264", SHORT_GROUPS)])
def test_an_avi_with_b_frames_and_gaps_is_as_long_as_its_header_says(tmp_path, codec, options):
  def leave_gaps(packets):
    for shift, packet in enumerate(packets):
      packet.pts, packet.dts = packet.pts + shift, packet.dts + shift

  path = write_numbers(tmp_path / "a.avi", range(40), "avi", codec, options, change=leave_gaps)
  with av.open(str(path)) as container:
    seconds = container.duration / 1e6
  assert seconds > 3
  assert_shows(path, range(40), seconds)


@pytest.mark.parametrize("has_durations", [True, False])
@pytest.mark.parametrize("codec, options", [("libx264", NO_B_FRAMES), ("libvpx", VPX)])
def test_a_last_picture_that_is_held_longest_is_part_of_the_film(
  tmp_path, codec, options, has_durations
):
  def hold(packets):
    packets[-1].duration = round(20 / packets[-1].time_base)

  path = write_numbers(
    tmp_path / "a.mkv", range(5), "matroska", codec, options,
    milliseconds=[0, 300, 900, 1000, 4000], change=hold,
  )  # fmt: skip
  if not has_durations:  # the name of the element becomes that of a filler
    data = path.read_bytes()
    assert b"\x9b" in data
    path.write_bytes(data.replace(b"\x9b\x82", b"\xec\x82"))
  assert_shows(path, range(5), 24)
  with av.open(str(path)) as container:
    last = [packet.pos for packet in container.demux(video=0) if packet.size][-1]
  path.write_bytes(path.read_bytes()[:last])
  with pytest.raises(InputError, match="truncated"):
    open_video(path)


def test_a_long_gap_is_time_that_passes(tmp_path):
  path = write_numbers(
    tmp_path / "a.mkv",
    range(3),
    "matroska",
    "libx264",
    NO_B_FRAMES,
    milliseconds=[0, 60_000, 60_040],
  )
  assert_shows(path, range(3), 60.08)
