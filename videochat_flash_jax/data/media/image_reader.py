"""Reads images of any kind as uint8 RGB, the way an image viewer shows them."""

import contextlib
import io
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from videochat_flash_jax.data.media.files import check_regular, is_address, local_path, open_media
from videochat_flash_jax.errors import InputError, one_line

ImageSource = str | Path | Image.Image | np.ndarray

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_logger = logging.getLogger("videochat_flash_jax")


def read_image(source: ImageSource) -> np.ndarray:
  """Reads one image as uint8 RGB.

  The rotation that the camera recorded is applied, transparent parts become white, gray becomes
  RGB, and 16 bits a channel are reduced to 8. Gray of 32 bits, integers or floats, is read if its
  values tell its range: 0 to 1, to 255 or to 65535. Only the first picture of an animation is read.

  Args:
    source: a path, a Pillow image, or an array uint8 `[H, W, 3]` or, for gray, `[H, W]`.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    InputError: there is no such file, it is not an image, its values have another range, or the
      array has another shape or dtype.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  if isinstance(source, Image.Image):
    with _named_errors("the image"):
      return _as_rgb(source)
  if not isinstance(source, str | os.PathLike) or not str(source):
    raise InputError(
      f"{source!r:.100} is not an image; give a path, a Pillow image or a uint8 array"
    )
  source = local_path(source)
  if os.path.isdir(source):
    raise InputError(f"{source}: a folder, not an image; give its images one by one")
  if not is_address(source) and not os.path.exists(source):
    raise InputError(f"{source}: there is no such image file; check the path")
  check_regular(source)
  with _named_errors(source):
    try:
      return _read_file(open_media(source), source)
    except Exception:
      # Pillow may stumble over damaged EXIF before it reads the pixels: it is hidden from it.
      with open_media(source) if is_address(source) else open(source, "rb") as file:
        data = file.read()
      hidden = _hide_exif(data)
      if hidden == data:
        raise
      return _read_file(io.BytesIO(hidden), source)


def is_picture(path: str | os.PathLike) -> bool:
  """Whether a local file is a picture that does not move, by its name and its content."""
  if Path(path).suffix.lower() not in _PICTURES or not os.path.isfile(path):
    return False
  try:
    with Image.open(path) as image:
      return not getattr(image, "is_animated", False)
  except Exception:  # Pillow raises many kinds for damaged files
    return False


def _hide_exif(data: bytes) -> bytes:
  """Returns a file without its EXIF, or with another name for it."""
  name = data.find(b"eXIf")  # of a chunk of PNG: its length, name, content and checksum
  if data.startswith(b"\x89PNG") and name >= 4:
    length = int.from_bytes(data[name - 4 : name])
    data = data[: name - 4] + data[name + 8 + length :]
  return data.replace(b"Exif", b"none")


def _read_file(file, name):
  with Image.open(file) as picture:
    if getattr(picture, "is_animated", False):
      _logger.warning("%s holds several pictures; only the first is read", one_line(name))
    return _as_rgb(picture)


def _from_array(array):
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
    raise InputError(f"the image is {array.dtype} {array.shape}; give uint8 [height, width, 3]")
  if not array.size:
    raise InputError(f"the image has no pixels, its shape is {array.shape}; give another one")
  return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array


@contextlib.contextmanager
def _named_errors(name):
  """Turns every error inside the block into an `InputError` that names the image.

  Pillow reports a broken picture by errors of many types.
  """
  try:
    yield
  except InputError:
    raise
  except _UnknownRange as error:
    raise InputError(
      f"{name}: its values do not tell which of them is white (1, 255 or 65535); save the picture "
      "with 8 bits a channel"
    ) from error
  except Image.DecompressionBombError as error:
    raise InputError(f"{name}: far too many pixels to decode; scale the picture down") from error
  except Exception as error:  # IndexError, struct.error, SyntaxError...
    raise InputError(f"{name}: not a readable picture; give a complete .jpg or .png") from error


def _as_rgb(picture):
  # Integers of these formats have 16 bits where Pillow reads more than 8. PPM may also hold floats.
  has_16_bits = picture.mode.startswith("I;") or (
    picture.mode == "I" and picture.format in ("PNG", "PPM")
  )
  with contextlib.suppress(Exception):  # damaged EXIF costs the rotation, not the picture
    picture = ImageOps.exif_transpose(picture)
  if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
    return _from_array(_eight_bits(np.asarray(picture), has_16_bits))
  if picture.has_transparency_data:
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture.convert("RGBA"))
  return np.asarray(picture.convert("RGB"))


class _UnknownRange(ValueError):
  """The values of a picture do not tell which of them is white."""


def _eight_bits(values, has_16_bits):
  """Reduces gray of more than 8 bits to 8. Pillow's own conversion clips at 255."""
  lowest, highest = values.min(), values.max()
  if has_16_bits or (lowest >= 0 and 4096 <= highest <= 65535):
    return (values // 256).astype(np.uint8)
  # Between the ranges, a picture may be a dark one, or one of a smaller range: black as it is.
  if lowest >= 0 and 16 <= highest <= 255:
    return np.rint(values).astype(np.uint8)
  if lowest >= 0 and highest <= 1:
    return np.rint(values * 255).astype(np.uint8)
  raise _UnknownRange
