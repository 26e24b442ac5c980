"""Which stream of a file is the film, and how it is turned."""

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.media.numbered_videos import NO_B_FRAMES, number_shown, write_numbers
from tests.data.media.video_files import decode_everything, pictures, write_video
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.errors import InputError

# The eight ways to turn a picture by quarters and to mirror it: (a, b, c, d) of the matrix.
WAYS = {
  (1, 0, 0, 1): lambda picture: picture,
  (-1, 0, 0, 1): np.fliplr,
  (1, 0, 0, -1): np.flipud,
  (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
  (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),
  (0, -1, 1, 0): np.rot90,
  (0, 1, 1, 0): lambda picture: picture.swapaxes(0, 1),
  (0, -1, -1, 0): lambda picture: np.rot90(picture.swapaxes(0, 1), 2),
}


def matrix(a, b, c, d) -> bytes:
  return np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_film_is_turned_and_mirrored_by_its_matrix(tmp_path, way):
  path = write_video(tmp_path / "v.mp4", pictures(2))
  expected = decode_everything(path)
  data = path.read_bytes()
  track = data.index(b"tkhd")
  path.write_bytes(data[:track] + data[track:].replace(matrix(1, 0, 0, 1), matrix(*way), 1))
  with open_video(path) as video:
    frames = video.read([1, 0])
    assert frames[0].shape == (video.info.height, video.info.width, 3)
  for frame, picture in zip(frames, expected[::-1], strict=True):
    np.testing.assert_array_equal(frame, WAYS[way](picture))


@pytest.mark.parametrize("orientation, turns", [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_a_frame_with_other_data_beside_its_rotation_is_turned(tmp_path, orientation, turns):
  exif = Image.Exif()
  exif[0x0112] = orientation
  picture = np.full((16, 24, 3), 200, np.uint8)
  picture[:8, :12] = 0
  Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
  with open_video(tmp_path / "a.jpg") as video:
    (frame,) = video.read([0]).astype(int)
  np.testing.assert_allclose(frame, np.rot90(picture, turns), atol=40)


def write_streams(path, streams):
  """Writes streams (size, first number, count, is default) into one file."""
  with av.open(str(path), "w") as container:
    packets, templates = [], []
    for number, (size, first, count, is_default) in enumerate(streams):
      part = write_numbers(
        path.with_name(f"part{number}.mkv"), range(first, first + count), "matroska", "libx264",
        NO_B_FRAMES, size=size,
      )  # fmt: skip
      source = av.open(str(part))
      stream = container.add_stream_from_template(source.streams.video[0])
      stream.disposition = av.stream.Disposition.default if is_default else 0
      templates.append((source, stream))
    for source, stream in templates:
      for packet in source.demux(video=0):
        if packet.size:
          packet.stream = stream
          packets.append(packet)
    for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
      container.mux(packet)
    for source, _ in templates:
      source.close()
  return path


FILMS = [
  ([(16, 0, 2, False), (64, 100, 50, True)], 1),  # a preview, then the default
  ([(64, 0, 50, False), (32, 100, 50, True)], 1),  # the default counts more than the size
  ([(16, 0, 50, False), (64, 100, 50, False)], 1),  # the larger one
  ([(64, 0, 10, False), (64, 100, 50, False)], 1),  # the longer one
  ([(128, 0, 1, False), (64, 100, 50, False)], 1),  # a large picture is no film
  ([(64, 0, 50, False), (16, 100, 50, False)], 0),
  ([(64, 0, 50, False), (64, 100, 50, False)], 0),  # all alike: the first
]


@pytest.mark.parametrize(
  "suffix, streams, film",
  [("mkv", *case) for case in FILMS] + [("ts", *case) for case in FILMS[2:]],  # .ts has no default
)
def test_the_film_is_read_and_not_its_preview(tmp_path, suffix, streams, film):
  path = write_streams(tmp_path / f"v.{suffix}", streams)
  size, first, count, _ = streams[film]
  with open_video(path) as video:
    assert (video.info.num_frames, video.info.height) == (count, size)
    assert number_shown(video.read([count - 1])[0]) == first + count - 1


def test_an_animated_webp_is_refused_for_what_it_is(tmp_path):
  frames = [Image.fromarray(picture) for picture in pictures(3)]
  frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
  with pytest.raises(InputError, match=r"a\.webp: animated WebP .*; convert it to mp4"):
    open_video(tmp_path / "a.webp")
  frames[0].save(tmp_path / "b.webp", lossless=True)
  with open_video(tmp_path / "b.webp") as video:
    np.testing.assert_allclose(video.read([0])[0].astype(int), pictures(1)[0], atol=6)
