"""A reading that is broken off, or closed, lets go of its threads and files at once."""

import gc
import os
import subprocess
import sys
import threading
import time

import av
import pytest

from tests.data.media.video_files import SHORT_GROUPS, pictures, write_video
from videochat_flash_jax.data.media.video_reader import open_video

READ_IN_PART = """
import faulthandler, logging, sys
import av
from videochat_flash_jax.data.media.video_reader import open_video

faulthandler.dump_traceback_later(60, exit=True)
av.logging.set_level(av.logging.VERBOSE)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False
for number in range(30):
  video = open_video(sys.argv[1], num_threads=4, logs_damage=False)
  frames = video.frames(range(100))
  for _ in range(1 + number % 7):
    next(frames)
  if number % 2:
    frames.close()
    video.close()
  del frames, video
"""


def test_a_damaged_film_read_in_part_is_closed_while_its_decoder_writes_to_a_log(tmp_path):
  options = {"preset": "veryfast", "x264-params": "keyint=60:bframes=3"}
  path = write_video(tmp_path / "v.mp4", pictures(120, 240, 320), options=options)
  with av.open(str(path)) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  data = bytearray(path.read_bytes())
  for position, size in packets[3:]:
    for place in range(size // 3, size, size // 6 + 1):
      data[position + place] ^= 0x55
  path.write_bytes(data)
  command = [sys.executable, "-c", READ_IN_PART, str(path)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr


def files_and_threads() -> tuple[int, int]:
  return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("indices", [range(120), range(0, 120, 7)])
@pytest.mark.parametrize("image_size", [None, 16])
def test_a_reading_that_is_broken_off_lets_go_without_the_garbage_collector(
  tmp_path, indices, image_size
):
  path = write_video(tmp_path / "v.mp4", pictures(120), options=SHORT_GROUPS)
  open_video(path).read([0])
  gc.collect()
  gc.disable()
  try:
    before = files_and_threads()
    video = open_video(path, num_threads=3)
    frames = video.frames(indices, image_size)
    next(frames)
    del frames, video
    for _ in range(100):  # a thread that was waited for may take a moment to vanish
      if files_and_threads() == before:
        break
      time.sleep(0.05)
    assert files_and_threads() == before
  finally:
    gc.enable()


def test_breaking_off_does_not_wait_for_a_long_segment(tmp_path, monkeypatch):
  path = write_video(
    tmp_path / "v.mp4", pictures(60), options={"x264-params": "keyint=30:min-keyint=30"}
  )
  with open_video(path, num_threads=2) as video:
    fit, waiting, seen = video._fit, threading.Event(), []

    def slow_fit(index, *arguments):
      seen.append(index)
      if index >= 30:
        waiting.wait(5)
      return fit(index, *arguments)

    monkeypatch.setattr(video, "_fit", slow_fit)
    frames = video.frames([*range(20), *range(30, 60)], 16)
    next(frames)
    threading.Timer(0.2, waiting.set).start()
    frames.close()
  assert len([index for index in seen if index >= 30]) < 5
