"""Files by path or by address: `gs://`, `s3://`, `http://` and whatever else fsspec knows.

An address is read where it is, by parts, of which 32 MB are held: nothing is copied to the disk.
Yet to open a video there fetches all of it: when its frames are shown is told by walking over all
packets, see video_timeline.py. The parts that its frames are in are fetched once more, if they are
not held any longer. Paths of the local disk are left to those who read them.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from videochat_flash_jax.errors import InputError

_BLOCK_BYTES = 1 << 20
_NUM_BLOCKS = 32  # of one file kept in memory; those used least recently go first
_COPIED_BYTES = 1 << 22
_CHANGING_FACTS = (
  "ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "generation", "md5Hash",
  "Content-MD5", "Digest",
)  # fmt: skip
_GONE, _BUSY = (404, 410), (408, 425, 429)  # what a web server says; from 500 on it fails, too
_PACKAGES = {
  "gs": "gcsfs",
  "gcs": "gcsfs",
  "s3": "s3fs",
  "http": "aiohttp",
  "https": "aiohttp",
  "az": "adlfs",
  "abfs": "adlfs",
}


def check_regular(path: str | os.PathLike) -> None:
  """Refuses what would be waited for, or read without end: a pipe, a socket, a device.

  What is missing passes, and so do folders and addresses.

  Raises:
    InputError: the path is of such a thing.
  """
  is_here = not is_address(path) and os.path.exists(path)
  if is_here and not (os.path.isfile(path) or os.path.isdir(path)):
    raise InputError(f"{path}: a pipe or a device, no file; copy what it gives into a file")


def is_address(path: str | os.PathLike) -> bool:
  """Whether a path is an address such as "gs://bucket/a.mp4"."""
  return re.match(r"[A-Za-z][\w+.-]*://", str(path)) is not None


def open_media(path: str | os.PathLike) -> str | os.PathLike | BinaryIO:
  """What PyAV and Pillow can open: a local path as it is, an address as a seekable binary file.

  Raises:
    InputError: there is no such file, its server sends no parts, a package for it is missing, or
      the network or the server fails; the latter, which may not last, has an OSError as its cause.
  """
  if not is_address(path):
    return path
  with _named_errors(path):
    files, name = file_system(str(path))
    file = files.open(
      name,
      "rb",
      block_size=_BLOCK_BYTES,
      cache_type="blockcache",
      cache_options={"maxblocks": _NUM_BLOCKS},
    )
    _check_parts(file, path)
  return file


def _check_parts(file, path):
  """Reads the last byte, and so what a decoder wants first: where an mp4's index often is."""
  try:
    file.seek(-1, os.SEEK_END)
    file.read(1)
    file.seek(0)
  except ValueError as error:  # fsspec's, of a server that answers with the whole file
    raise InputError(
      f"{path}: the file is empty, or its server sends no parts of files; download it first"
    ) from error


def exists(path: str | os.PathLike) -> bool:
  """Whether there is a file, or a folder, of this path or address.

  Raises:
    InputError: this cannot be told now: the network or the server fails; see `open_media`.
  """
  if not is_address(path):
    return os.path.exists(path)
  try:
    file_stamp(path)
  except InputError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      return False
    raise
  return True


def file_stamp(path: str | os.PathLike) -> tuple[int, int | str]:
  """Size in bytes, and what else changes when a file does, if that is known ("" if not).

  Raises:
    OSError: of a local file.
    InputError: as `check_regular`; of an address, as `open_media`.
  """
  check_regular(path)
  if not is_address(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
  with _named_errors(path):
    files, name = file_system(str(path))
    facts = files.info(name)
  changing = [f"{field} {facts[field]}" for field in _CHANGING_FACTS if facts.get(field)]
  return facts.get("size") or 0, ", ".join(changing)


def copy_file(address: str, path: Path) -> None:
  """Copies a file from an address to the local disk; raises as `open_media`."""
  with open(path, "wb") as copy, _named_errors(address):
    files, name = file_system(address)
    with files.open(name, "rb") as remote:
      shutil.copyfileobj(remote, copy, _COPIED_BYTES)


@contextlib.contextmanager
def _named_errors(address: str | os.PathLike) -> Iterator[None]:
  """Libraries of many makers fail in as many ways."""
  try:
    yield
  except InputError:
    raise
  except FileNotFoundError as error:
    # fsspec says so of a web server that cannot be reached, fails or refuses, too.
    if error.__cause__ and str(address).startswith("http"):
      status = getattr(error.__cause__, "status", 500)
      if status not in _GONE:
        may_pass = status >= 500 or status in _BUSY
        cause = (ConnectionError if may_pass else PermissionError)(str(error.__cause__))
        raise _failure(address, error) from cause
    raise InputError(f"{address}: there is no such file; check the address") from error
  except OSError as error:
    raise _failure(address, error) from error
  except Exception as error:
    raise _failure(address, error) from ConnectionError(str(error))


def server_failure(error: Exception) -> Exception:
  """An error met while a file is read; what a web server has failed in is a `ConnectionError`."""
  is_of_server = type(error).__module__.partition(".")[0] == "aiohttp"
  return ConnectionError(str(error)) if is_of_server else error


def _failure(address, error):
  reason = " ".join(str(error.__cause__ or error).split())
  return InputError(
    f"{address}: cannot be read ({reason or type(error).__name__}); try again, or copy it here"
  )


def file_system(address: str):
  """The file system (of fsspec) of an address, and the file's name in it.

  Raises:
    InputError: it has a protocol that is unknown, or whose package is missing.
  """
  import fsspec  # slow to import, and seldom needed

  protocol = address.partition("://")[0]
  try:
    return fsspec.core.url_to_fs(address)
  except ImportError as error:
    package = _PACKAGES.get(protocol)
    remedy = f"pip install {package}" if package else str(error).strip()
    raise InputError(f"{address}: {protocol}:// needs a package more; {remedy}") from error
  except ValueError as error:
    raise InputError(f"{address}: {protocol}:// is no protocol that can be read") from error
