"""What is no file of frames, though it may lead to some: refused before anything is waited for."""

import os
import threading

import pytest

from tests.data.media.bad_video_test import text_file
from tests.data.media.video_files import pictures, write_video
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError


def pipe(path):
  os.mkfifo(path)


def playlist_without_an_end(path):
  write_video(path.with_name("part.ts"), pictures(8), fps=4)
  header = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXT-X-MEDIA-SEQUENCE:0\n"
  path.write_text(f"{header}#EXTINF:10.0,\npart.ts\n")


def list_of_other_files(path):
  write_video(path.with_name("other.mp4"), pictures(8))
  path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def session_description(path):
  address = "o=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
  path.write_text(f"v=0\n{address}m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n")


@pytest.mark.parametrize(
  "name, write",
  [
    ("notes.txt", text_file),  # by this name FFmpeg would film it
    ("film.m3u8", playlist_without_an_end),  # and read this for ever
    ("film.ffconcat", list_of_other_files),
    ("film.sdp", session_description),
    ("film.m3u8", pipe),
  ],
)
def test_what_only_names_other_files_is_refused_at_once(tmp_path, name, write):
  path, errors = tmp_path / name, []
  write(path)

  def read():
    for row in ({"video": str(path)}, {"video": str(path), "start": 0, "end": 2}):
      try:
        read_row_video(row, ExampleConfig(image_size=32))
      except BrokenRow as error:
        errors.append(error)

  thread = threading.Thread(target=read, daemon=True)  # what hangs inside FFmpeg hears no signal
  thread.start()
  thread.join(20)
  assert [error.reason for error in errors] == ["unreadable video"] * 2
  assert "a pipe or" in str(errors[0]) if write is pipe else "a playlist or a" in str(errors[0])


def test_a_list_at_an_address_opens_nothing_on_this_machine(tmp_path):
  import fsspec

  target = write_video(tmp_path / "other.mp4", pictures(8))
  with fsspec.open("memory://list.mp4", "w") as file:
    file.write(f"ffconcat version 1.0\nfile {target}\n")
  with pytest.raises(InputError, match="a playlist or a text"):
    open_video("memory://list.mp4")
