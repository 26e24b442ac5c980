"""Films with random damage end as frames or as an `InputError`, in bounded time and memory."""

import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.media.numbered_videos import (
  MPEG2,
  NO_B_FRAMES,
  OPEN_GROUPS,
  SHORT_GROUPS,
  VPX,
  write_numbers,
)
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.errors import InputError

CASES = Path(__file__).parents[2] / "cases" / "media"
KINDS = {
  "h264.mp4": ("mp4", "libx264", SHORT_GROUPS),
  "fragments.mp4": ("mp4", "libx264", OPEN_GROUPS),
  "hevc.mp4": ("mp4", "libx265", {"x265-params": "log-level=none:keyint=12:pools=none"}),
  "h264.mkv": ("matroska", "libx264", OPEN_GROUPS),
  "vp8.webm": ("webm", "libvpx", VPX),
  "vp9.webm": ("webm", "libvpx-vp9", VPX),
  "h264.ts": ("mpegts", "libx264", OPEN_GROUPS),
  "mpeg2.mpg": ("vob", "mpeg2video", MPEG2),
  "mpeg4.avi": ("avi", "mpeg4", MPEG2),
  "h264.flv": ("flv", "libx264", NO_B_FRAMES),
  "h264.h264": ("h264", "libx264", SHORT_GROUPS),
  "mjpeg.mov": ("mov", "mjpeg", {}),
}
_SECONDS, _GROWTH_KIB = 30, 1 << 20  # far above what any of them takes


def mutated(data: bytes, seed: int) -> bytes:
  """Damages a file: bytes and sizes, and stretches that are zeroed, random, lost or repeated."""
  choose, damaged = random.Random(seed), bytearray(data)
  for _ in range(choose.choice([1, 1, 2, 4, 16])):
    start = choose.randrange(len(damaged))
    if choose.random() < 0.3:  # headers are small, and matter most
      start = min(start, choose.randrange(1000))
    stop = min(len(damaged), start + choose.choice([1, 4, 40, 188, 1000]))
    match choose.randrange(7):
      case 0 | 1:
        damaged[start] = choose.randrange(256)
      case 2:
        damaged[start:stop] = bytes(stop - start)
      case 3:
        damaged[start:stop] = choose.randbytes(stop - start)
      case 4 if len(damaged) > 2000:
        del damaged[start:stop]
      case 5:
        damaged[start:start] = damaged[start:stop]
      case _:
        damaged[start : start + 4] = choose.choice([0, 1, 2**31 - 1, 2**32 - 1]).to_bytes(4)
  return bytes(damaged)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[bytes]:
  path = tmp_path_factory.mktemp("films") / "film"
  films = []
  for name, (file_format, codec, options) in KINDS.items():
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    muxer = {"movflags": "frag_keyframe+empty_moov"} if name == "fragments.mp4" else {}
    write_numbers(path, range(60), file_format, codec, options, pixels=pixels, muxer=muxer)
    films.append(path.read_bytes())
  return films


def read_or_refuse(path: Path) -> bool:
  """Reads a few frames in several ways; returns whether it was refused. Any other error is one."""
  begun = time.monotonic()
  try:
    with open_video(path, num_threads=2, logs_damage=False) as video:
      last = video.info.num_frames - 1
      assert video.info.seconds > 0 and np.isfinite(video.info.fps)
      assert len(video.read([0, last // 3, last], 32)) == 3
      assert sum(1 for _ in video.frames(range(max(0, last - 20), last, 3), 16)) <= 7
    return False
  except InputError as error:
    if str(path) not in str(error) or "\n" in str(error):
      raise AssertionError("not one line that names the file") from error
    return True
  finally:
    assert time.monotonic() - begun < _SECONDS


@pytest.mark.parametrize(
  "seeds", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.slow)]
)
def test_a_mutated_film_is_read_or_refused(tmp_path, films, seeds):
  path, refused = tmp_path / "film", 0
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in seeds:
    path.write_bytes(mutated(films[seed % len(films)], seed))
    refused += read_or_refuse(path)
  assert 0 < refused < len(seeds)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _GROWTH_KIB


@pytest.mark.parametrize("name", ["mutated_no_packets.mp4", "mutated_streams_vanish.ts"])
def test_a_film_whose_streams_or_packets_vanish_is_read_or_refused(name):
  read_or_refuse(CASES / name)
