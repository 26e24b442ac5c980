"""Annotations and media at addresses: from a file server on this machine."""

import http.server
import json
import os
import re
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.media.video_files import decode_everything, pictures, write_video
from tests.data.mixture.mutations import turns
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.replacement import may_pass
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.media.files import exists, file_stamp, is_address, open_media
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.errors import InputError


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves files, and parts of them as object stores do."""

  def do_HEAD(self):
    if self.server.failure:
      return self.send_error(self.server.failure)
    return super().do_HEAD()

  def do_GET(self):
    if self.server.failure:
      return self.send_error(self.server.failure)
    path = Path(self.translate_path(self.path))
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not wanted or not path.is_file() or not self.server.sends_parts:
      return super().do_GET()
    data = path.read_bytes()
    start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    self.send_header("Content-Length", str(stop - start))
    self.end_headers()
    self.wfile.write(data[start:stop])
    self.server.num_bytes += stop - start
    if self.server.num_bytes > self.server.most_bytes:
      self.server.failure = 503
    return None

  def send_header(self, name, value):
    if name != "Last-Modified" or self.server.tells_time:
      super().send_header(name, value)

  def end_headers(self):
    if self.server.sends_parts:
      self.send_header("Accept-Ranges", "bytes")
    super().end_headers()

  def log_message(self, *args):
    pass


@pytest.fixture
def server(tmp_path):
  """A server of the files in `tmp_path`; `server.address` is that of the folder."""

  def handler(*args):
    return Handler(*args, directory=str(tmp_path))

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    server.sends_parts, server.tells_time, server.num_bytes, server.failure = True, True, 0, None
    server.most_bytes = 1 << 30
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def test_addresses_are_told_from_paths():
  assert is_address("gs://bucket/a.mp4")
  assert is_address("https://host/a b")
  for path in ("a.mp4", "/a.mp4", "a:b.mp4", "a:/b", "C:\\a.mp4", "./s3:/a", Path("gs://b")):
    assert not is_address(path)
    assert open_media(path) == path


def test_a_video_at_an_address_is_decoded(tmp_path, server):
  path = write_video(tmp_path / "a.mp4", pictures(40))
  with open_media(f"{server.address}/a.mp4") as file, av.open(file) as container:
    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  np.testing.assert_array_equal(frames, decode_everything(path))
  assert file_stamp(f"{server.address}/a.mp4")[0] == path.stat().st_size


def test_only_parts_of_a_long_file_are_fetched(tmp_path, server):
  data = np.random.default_rng(0).bytes(20 << 20)
  (tmp_path / "a.bin").write_bytes(data)
  with open_media(f"{server.address}/a.bin") as file:
    for place in (19 << 20, 0, 5 << 20):
      file.seek(place)
      assert file.read(1000) == data[place : place + 1000]
  assert server.num_bytes < 8 << 20


def test_an_image_at_an_address_is_read(tmp_path, server):
  picture = pictures(1)[0]
  Image.fromarray(picture).save(tmp_path / "a.png")
  with open_media(f"{server.address}/a.png") as file, Image.open(file) as image:
    np.testing.assert_array_equal(np.asarray(image), picture)


def test_a_mixture_may_lie_at_an_address(tmp_path, server):
  (tmp_path / "media").mkdir()
  (tmp_path / "media" / "a.mp4").touch()
  rows = [{"id": i, "video": "a.mp4", "conversations": turns("<image>?", "Ü!")} for i in range(9)]
  (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
  entry = {"json_path": f"{server.address}/rows.json", "data_root": f"{server.address}/media/"}
  (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": [entry]}))
  for path in (tmp_path / "mixture.yaml", f"{server.address}/mixture.yaml"):
    opened = open_rows(read_mixture(path), tmp_path / "cache")
    assert len(opened) == 9
    assert opened[8] == rows[8] | {"video": f"{server.address}/media/a.mp4"}


def test_what_is_not_there_is_told(tmp_path, server):
  assert not exists(f"{server.address}/none.mp4")
  with pytest.raises(InputError, match="there is no such file; check the address"):
    open_media(f"{server.address}/none.mp4").close()
  with pytest.raises(InputError, match="there is no such file"):
    open_rows(read_mixture(f"{server.address}/none.json"), tmp_path / "cache")
  with pytest.raises(InputError, match="there is no such file"):
    read_mixture(f"{server.address}/none.yaml")


def test_a_server_that_sends_no_parts_is_told(tmp_path, server):
  (tmp_path / "a.bin").write_bytes(bytes(3 << 20))
  server.sends_parts = False
  with pytest.raises(InputError, match="cannot send parts of a file; download it first"):
    open_media(f"{server.address}/a.bin")
  (tmp_path / "b.bin").touch()
  with pytest.raises(InputError, match="the file is empty, or"):
    open_media(f"{server.address}/b.bin")


def test_a_server_that_is_not_there_is_an_error_that_may_pass(server):
  address = f"{server.address}/a.mp4"
  server.shutdown()
  server.server_close()
  with pytest.raises(InputError, match=r"127\.0\.0\.1.*cannot be read .*try again") as raised:
    open_media(address)
  assert may_pass(raised.value)


def row_failure(address):
  with pytest.raises(BrokenRow) as raised:
    read_row_video({"video": address}, ExampleConfig(image_size=32))
  return raised.value.reason, may_pass(raised.value)


def test_a_row_whose_server_fails_or_is_gone_is_not_missing_and_may_pass(tmp_path, server):
  write_video(tmp_path / "a.mp4", pictures(8))
  address = f"{server.address}/a.mp4"
  assert row_failure(f"{server.address}/none.mp4") == ("missing file", False)
  for failure, passing in ((503, True), (500, True), (429, True), (403, False), (404, None)):
    server.failure = failure
    if passing is None:
      assert not exists(address)
      assert row_failure(address) == ("missing file", False)
      continue
    with pytest.raises(InputError, match="cannot be read"):
      exists(address)
    assert row_failure(address) == ("unreadable video", passing)
  server.shutdown()
  server.server_close()
  assert row_failure(address) == ("unreadable video", True)
  with pytest.raises(InputError, match="cannot be read"):
    exists(address)


def test_a_server_that_fails_while_a_video_is_read_is_an_error_that_may_pass(tmp_path, server):
  frames = np.random.default_rng(0).integers(0, 255, (16, 480, 640, 3), np.uint8)
  path = write_video(tmp_path / "a.mp4", frames, codec="mjpeg", pixels="yuvj420p")
  assert path.stat().st_size > 1 << 20
  server.most_bytes = 1 << 10
  assert row_failure(f"{server.address}/a.mp4") == ("unreadable video", True)


@pytest.mark.parametrize("tells_time", [True, False])
def test_an_annotation_file_that_changed_at_its_address_is_read_again(tmp_path, server, tells_time):
  server.tells_time = tells_time
  for number, time in ((1, 10), (2, 20), (2, 20)):
    row = {"id": number, "conversations": turns("How many?", "Two.")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")  # each of the same size
    os.utime(tmp_path / "rows.jsonl", (time, time))
    rows = open_rows(read_mixture(f"{server.address}/rows.jsonl"), tmp_path / "cache")
    assert rows[0]["id"] == number
  assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_folder_of_pictures_at_an_address_is_refused_with_what_to_do(server):
  row = {"video": f"{server.address}/pictures", "video_read_type": "img"}
  with pytest.raises(
    BrokenRow, match=r"^unreadable video: .* can only be read from this machine; copy"
  ):
    read_row_video(row, ExampleConfig(image_size=32))


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "s3fs", None)
  with pytest.raises(InputError, match="s3:// needs one more package; pip install s3fs"):
    open_media("s3://bucket/a.mp4")
  with pytest.raises(InputError, match="nonsense:// is an unknown protocol"):
    open_media("nonsense://bucket/a.mp4")
