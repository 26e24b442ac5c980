"""Reads the pictures of a folder, as the frames of a video."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from videochat_flash_jax.data.media.files import check_regular
from videochat_flash_jax.errors import InputError

_SUFFIXES = {".jpg", ".jpeg", ".png"}


def list_pictures(folder: Path) -> list[Path]:
  """Lists the .jpg and .png files of a folder in natural order: 2.jpg before 10.jpg.

  Raises:
    InputError: the folder cannot be read, or has no such files.
  """
  try:
    files = list(folder.iterdir())
  except OSError as error:
    raise InputError(
      f"{folder}: cannot be read ({error.strerror}); check its permissions"
    ) from error
  pictures = sorted(
    (file for file in files if file.suffix.lower() in _SUFFIXES),
    key=lambda file: [
      int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)
    ],
  )
  if not pictures:
    raise InputError(f"{folder}: the folder has no .jpg or .png; give a folder of pictures")
  return pictures


def read_picture(file: Path) -> np.ndarray:
  """Reads a picture as uint8 `[H, W, 3]`.

  Raises:
    InputError: the file is not a readable picture, or not a regular file.
  """
  check_regular(file)
  try:
    with Image.open(file) as picture:
      return np.asarray(picture.convert("RGB"))
  except OSError as error:  # Pillow's own error for a file that is not a picture is one, too
    raise InputError(f"{file}: not a readable picture; replace or remove it") from error
