"""Lists the pictures of a folder that are the frames of a video."""

import re
from pathlib import Path

from videochat_flash_jax.errors import InputError

_SUFFIXES = {".jpg", ".jpeg", ".png"}
_FILMS = {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm", ".wmv"}


def list_pictures(folder: Path) -> list[Path]:
  """Lists the .jpg and .png files of a folder in natural order: 2.jpg before 10.jpg.

  Hidden files are left out: macOS writes a `._2.jpg`, which is no picture, beside a `2.jpg`.

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
    (f for f in files if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".")),
    key=lambda file: [
      int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)
    ],
  )
  if not pictures:
    films = sorted(file.name for file in files if file.suffix.lower() in _FILMS)
    remedy = f"one of its videos, such as {films[0]}" if films else "a folder of pictures"
    raise InputError(f"{folder}: the folder has no .jpg or .png; give {remedy}")
  return pictures
