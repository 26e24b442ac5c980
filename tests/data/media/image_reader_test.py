"""Pictures of all kinds come as uint8 RGB as shown; what is no picture is refused in one line."""

import itertools
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.data.features.feature_key import file_digest
from videochat_flash_jax.data.media.image_reader import read_image
from videochat_flash_jax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


@pytest.fixture
def path(tmp_path):
  PICTURE.save(tmp_path / "a.png")
  return tmp_path / "a.png"


def test_path_picture_and_array_give_the_same(path):
  for source in (path, str(path), PICTURE, PIXELS):
    np.testing.assert_array_equal(read_image(source), PIXELS)


def test_a_picture_that_was_looked_at_stays_usable(path):
  with Image.open(path) as picture:
    read_image(picture)
    np.testing.assert_array_equal(read_image(picture), PIXELS)


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 3), (8, 1)])
def test_a_rotation_noted_by_the_camera_is_applied(tmp_path, orientation, turns):
  exif = Image.Exif()
  exif[0x0112] = orientation
  PICTURE.save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(PIXELS, turns))


def test_exif_that_cannot_be_written_again_costs_the_rotation_alone():
  path = Path(__file__).parents[2] / "cases" / "media" / "exif_tag_cannot_be_written.jpg"
  assert read_image(path).shape in ((16, 24, 3), (24, 16, 3))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_damaged_exif_never_costs_the_picture(tmp_path, suffix):
  exif = Image.Exif()
  exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 300.0, 0x0128: 2})
  exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
  path = tmp_path / f"a.{suffix}"
  PICTURE.save(path, exif=exif, quality=100)
  whole, noted = path.read_bytes(), exif.tobytes()[6:]
  start, choose = whole.index(noted), random.Random(0)
  pixels = np.sort(read_image(path).reshape(-1, 3), axis=0)
  for _ in range(400):
    damaged = bytearray(whole)
    for _ in range(choose.choice([1, 2, 8])):
      damaged[start + choose.randrange(len(noted))] = choose.randrange(256)
    path.write_bytes(damaged)
    image = read_image(path)
    assert image.shape in ((6, 9, 3), (9, 6, 3))
    np.testing.assert_array_equal(np.sort(image.reshape(-1, 3), axis=0), pixels)  # not the order


def test_transparent_parts_become_white(tmp_path):
  opacity = np.zeros((6, 9, 1), np.uint8)
  opacity[:, 4:] = 255
  Image.fromarray(np.concatenate([PIXELS, opacity], axis=-1)).save(tmp_path / "a.png")
  image = read_image(tmp_path / "a.png")
  assert (image[:, :4] == 255).all()
  np.testing.assert_array_equal(image[:, 4:], PIXELS[:, 4:])


def test_a_transparent_palette_becomes_white(tmp_path):
  picture = Image.fromarray(np.zeros((2, 2), np.uint8)).convert("P")
  picture.save(tmp_path / "a.png", transparency=0)
  assert (read_image(tmp_path / "a.png") == 255).all()


def test_gray_becomes_three_equal_channels():
  gray = PIXELS[..., 0]
  expected = np.stack([gray] * 3, axis=-1)
  np.testing.assert_array_equal(read_image(gray), expected)
  np.testing.assert_array_equal(read_image(Image.fromarray(gray)), expected)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", np.int32])
def test_gray_of_16_bits_keeps_its_upper_8(dtype):
  gray = np.array([[0, 255, 256], [32767, 32768, 65535]], dtype)
  np.testing.assert_array_equal(
    read_image(Image.fromarray(gray))[..., 1], [[0, 0, 1], [127, 128, 255]]
  )


GRADIENT = np.linspace(0, 255, 24).astype(np.uint8).reshape(4, 6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("white, factor", [(255, 1), (65535, 257)])
def test_gray_of_32_bits_is_read_by_its_range(tmp_path, dtype, white, factor):
  Image.fromarray(GRADIENT.astype(dtype) * factor).save(tmp_path / "a.tif")
  np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 2], GRADIENT)


def test_gray_from_0_to_1_is_read():
  image = read_image(Image.fromarray(GRADIENT.astype(np.float32) / 255))
  np.testing.assert_array_equal(image[..., 0], GRADIENT)
  image = read_image(Image.fromarray(np.array([[0, 1]], np.int32)))
  np.testing.assert_array_equal(image[..., 0], [[0, 255]])


def test_a_dark_picture_whose_format_has_16_bits_stays_dark(tmp_path):
  dark = np.array([[0, 200], [700, 1300]], np.uint16)
  Image.fromarray(dark).save(tmp_path / "a.png")
  (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + dark.astype(">u2").tobytes())
  for name in ("a.png", "a.pgm"):
    np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], dark >> 8)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_the_floats_of_a_pfm_are_read_by_their_range(white):
  picture = Image.fromarray(GRADIENT.astype(np.float32) / 255 * white)
  picture.format = "PPM"  # as the newer Pillows report a .pfm file; the oldest reads none
  np.testing.assert_array_equal(read_image(picture)[..., 0], GRADIENT)


@pytest.mark.parametrize(
  "values", [[-1, 1], [0, 1 << 20], [0, 4.5], [0, 1000], [0, np.nan], [0, np.inf]]
)
def test_gray_of_another_range_is_refused_and_not_black(values):
  with pytest.raises(InputError, match="do not tell which of them is white"):
    read_image(Image.fromarray(np.array([values], np.float32)))


def test_the_first_picture_of_an_animation_counts_and_is_told(tmp_path, caplog):
  frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
  frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
  assert (read_image(tmp_path / "a.gif") == (255, 0, 0)).all()
  assert "only the first" in caplog.text


def test_cmyk_and_one_bit_become_rgb(tmp_path):
  Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
  assert read_image(tmp_path / "a.jpg")[0, 0].argmax() == 0
  assert (read_image(Image.new("1", (3, 2), 1)) == 255).all()


@pytest.mark.parametrize("shape", [(1, 1, 3), (10, 10_000, 3)])
def test_any_size_is_read(shape):
  assert read_image(np.zeros(shape, np.uint8)).shape == shape


@pytest.mark.parametrize(
  "source, said",
  [
    (np.zeros((4, 4, 3), np.float32), "float32"),
    (np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\)"),
    (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
    (np.zeros(4, np.uint8), r"\(4,\)"),
    (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    (None, "None is not an image"),
    ([[0, 1]], "is not an image"),
    (bytes(10_000), r"^b'\\x00.{,100} is not an image; .{,60}$"),
    ("", "'' is not an image"),
    ("nothing.png", "nothing.png.*no such image file"),
    ("nonsense://example.org/a.png", "nonsense:// is an unknown protocol"),
  ],
)
def test_what_is_no_image_is_refused(source, said):
  with pytest.raises(InputError, match=said):
    read_image(source)


def test_a_folder_is_refused(tmp_path):
  with pytest.raises(InputError, match="a folder"):
    read_image(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
  (tmp_path / "folder").mkdir()
  pipes, said = [tmp_path / "a.png", tmp_path / "folder" / "1.jpg"], []
  for path in pipes:
    os.mkfifo(path)

  def read():
    calls = read_image, read_image, file_digest
    for call, path in zip(calls, (*pipes, pipes[0]), strict=True):
      try:
        call(path)
      except InputError as error:
        said.append(str(error))

  thread = threading.Thread(target=read, daemon=True)
  thread.start()
  thread.join(20)
  assert len(said) == 3 and all("a pipe or a device, not a file; " in text for text in said)


@pytest.mark.parametrize(
  "broken",
  [
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:20],
    lambda whole: b"",
    lambda whole: b"This is no picture.\n" * 20,
    lambda whole: whole[:40] + bytes(20) + whole[60:],
  ],
  ids=["cut", "header only", "empty", "text", "zeros inside"],
)
def test_a_broken_file_is_refused_by_its_name(path, broken):
  path.write_bytes(broken(path.read_bytes()))
  with pytest.raises(InputError, match=r"a\.png: not a readable picture"):
    read_image(path)


def test_a_file_damaged_anywhere_is_read_or_refused(tmp_path):
  path = tmp_path / "a.gif"
  frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
  frames[0].save(path, save_all=True, append_images=frames[1:])
  content = path.read_bytes()
  refused = 0
  for place, value in itertools.product(range(len(content)), (0, 1, 255)):
    path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
    try:
      read_image(path)
    except InputError:  # Pillow raises OSError, ValueError or IndexError
      refused += 1
  assert 0 < refused < 3 * len(content)


def test_a_picture_of_too_many_pixels_is_refused(path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
  with pytest.raises(InputError, match="too many pixels"):
    read_image(path)
