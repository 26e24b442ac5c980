"""Reads images of any kind as uint8 RGB, the way an image viewer shows them."""

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from videochat_flash_jax.data.media.files import check_regular, is_address, open_media
from videochat_flash_jax.errors import InputError

ImageSource = str | Path | Image.Image | np.ndarray

_logger = logging.getLogger("videochat_flash_jax")


def read_image(source: ImageSource) -> np.ndarray:
  """Reads one image as uint8 RGB.

  The rotation that the camera recorded is applied, transparent parts become white, gray becomes
  RGB, and 16 bits a channel are reduced to 8. Only the first picture of an animation is read.

  Args:
    source: a path, a Pillow image, or an array uint8 `[H, W, 3]` or, for gray, `[H, W]`.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    InputError: there is no such file, it is not an image, or the array has another shape or dtype.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  if isinstance(source, Image.Image):
    with _named_errors("the image"):
      return _as_rgb(source)
  if not isinstance(source, str | os.PathLike) or not str(source):
    raise InputError(f"{source!r} is not an image; give a path, a Pillow image or a uint8 array")
  if os.path.isdir(source):
    raise InputError(f"{source}: a folder, not an image; give its images one by one")
  if not is_address(source) and not os.path.exists(source):
    raise InputError(f"{source}: there is no such image file; check the path")
  check_regular(source)
  file = open_media(source)
  with _named_errors(source), Image.open(file) as picture:
    if getattr(picture, "is_animated", False):
      _logger.warning("%s holds several pictures; only the first is read", source)
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
  except Image.DecompressionBombError as error:
    raise InputError(f"{name}: far too many pixels to decode; scale the picture down") from error
  except Exception as error:  # IndexError, struct.error, SyntaxError...
    raise InputError(f"{name}: not a readable picture; give a complete .jpg or .png") from error


def _as_rgb(picture):
  picture = ImageOps.exif_transpose(picture)
  if picture.mode.startswith("I"):  # gray of 16 bits; Pillow's own conversion clips at 255
    return _from_array((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
  if picture.has_transparency_data:
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture.convert("RGBA"))
  return np.asarray(picture.convert("RGB"))
