"""Opens files by path or by address: `gs://`, `s3://`, `http://` and the other protocols of fsspec.

A file at an address is read in parts over the network. Up to 32 MB of these parts are kept in
memory, and nothing is copied to the local disk. To open a video at an address, however, the whole
file is fetched: the times of its frames are found by reading all of its packets, see
video_timeline.py. The parts that hold the chosen frames are then fetched a second time, unless they
are still in memory. A path on the local disk is returned as it is; the library that decodes the
file opens it.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from videochat_flash_jax.errors import InputError

_BLOCK_BYTES = 1 << 20
_NUM_BLOCKS = 32  # of one file, kept in memory; the least recently used block is dropped first
_COPIED_BYTES = 1 << 22
# Fields of fsspec's `info` whose value changes when the file changes.
_VERSION_FIELDS = (
  "ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "generation", "md5Hash",
  "Content-MD5", "Digest",
)  # fmt: skip
# HTTP status codes: the file does not exist; try again later. Codes from 500 on are temporary, too.
_GONE, _BUSY = (404, 410), (408, 425, 429)
_PACKAGES = {
  "gs": "gcsfs",
  "gcs": "gcsfs",
  "s3": "s3fs",
  "http": "aiohttp",
  "https": "aiohttp",
  "az": "adlfs",
  "abfs": "adlfs",
}


def local_path(path: str | os.PathLike) -> str | os.PathLike:
  """What `~/a.mp4` and `file:///a.mp4`, as browsers write it, mean. Any other path stays."""
  plain = str(path)
  if plain.startswith("~") and not os.path.exists(plain):
    return os.path.expanduser(plain)
  if not plain.startswith("file://"):
    return path
  plain = plain.removeprefix("file://").removeprefix("localhost")
  return plain if os.path.exists(plain) else unquote(plain)


def check_regular(path: str | os.PathLike) -> None:
  """Raises an error for a path that cannot be read to its end: a pipe, a socket or a device.

  Reading one of these might wait forever or never end. Missing paths, folders and addresses pass.

  Raises:
    InputError: the path is a pipe, a socket or a device, or no file can have this name.
  """
  if is_address(path):
    return
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return
  except ValueError as error:  # it holds a NUL or half of a surrogate pair
    raise InputError(f"{path}: no file can have this name; correct the path") from error
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise InputError(f"{path}: a pipe or a device, not a file; copy its content into a file")


def is_address(path: str | os.PathLike) -> bool:
  """Returns whether a path is an address such as "gs://bucket/a.mp4"."""
  return re.match(r"[A-Za-z][\w+.-]*://", str(path)) is not None


def open_media(path: str | os.PathLike) -> str | os.PathLike | BinaryIO:
  """Returns something that PyAV and Pillow can open.

  A local path is returned as it is, an address as a binary file object that can seek.

  Raises:
    InputError: there is no such file, its server cannot send parts of a file, the package for its
      protocol is missing, or the network or the server fails. A failure of the network or the
      server may be temporary; such an error has an OSError as its cause.
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


def read_start(path: str | os.PathLike, num_bytes: int) -> bytes:
  """Returns the first bytes of a file, or all of a shorter one.

  Raises:
    OSError: a local file cannot be read.
    InputError: as in `open_media`.
  """
  with open_media(path) if is_address(path) else open(path, "rb") as file:
    return file.read(num_bytes)


def _check_parts(file, path):
  """Reads the last byte, to check that the server can send parts of a file.

  A decoder often reads the end of a file first, too: many mp4 files have their index there.
  """
  try:
    file.seek(-1, os.SEEK_END)
    file.read(1)
    file.seek(0)
  except ValueError as error:  # fsspec raises it when a server answers with the whole file
    raise InputError(
      f"{path}: the file is empty, or its server cannot send parts of a file; download it first"
    ) from error


def exists(path: str | os.PathLike) -> bool:
  """Returns whether there is a file or a folder at a path or an address.

  Raises:
    InputError: the network or the server fails, so that the answer is unknown; see `open_media`.
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
  """Returns a file's size in bytes and a value that changes when the file changes.

  The second value is the time of the last change in nanoseconds for a local file. For an address it
  is what the server reports (an ETag, a time, a hash), or "" if it reports nothing like that.

  Raises:
    OSError: a local file cannot be read.
    InputError: as in `check_regular`; for an address, as in `open_media`.
  """
  check_regular(path)
  if not is_address(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
  with _named_errors(path):
    files, name = file_system(str(path))
    info = files.info(name)
  versions = [f"{field} {info[field]}" for field in _VERSION_FIELDS if info.get(field)]
  return info.get("size") or 0, ", ".join(versions)


def copy_file(address: str, path: Path) -> None:
  """Copies a file from an address to the local disk.

  Raises:
    InputError: as in `open_media`.
  """
  with open(path, "wb") as copy, _named_errors(address):
    files, name = file_system(address)
    with files.open(name, "rb") as remote:
      shutil.copyfileobj(remote, copy, _COPIED_BYTES)


@contextlib.contextmanager
def _named_errors(address: str | os.PathLike) -> Iterator[None]:
  """Turns every error inside the block into an `InputError` that names the address.

  It is needed because the libraries for the protocols raise errors of many different types.
  """
  try:
    yield
  except InputError:
    raise
  except FileNotFoundError as error:
    # fsspec raises this also when a web server cannot be reached, fails, or denies access.
    if error.__cause__ and str(address).startswith("http"):
      status = getattr(error.__cause__, "status", 500)
      if status not in _GONE:
        is_temporary = status >= 500 or status in _BUSY
        cause = (ConnectionError if is_temporary else PermissionError)(str(error.__cause__))
        raise _failure(address, error) from cause
    raise InputError(f"{address}: there is no such file; check the address") from error
  except OSError as error:
    raise _failure(address, error) from error
  except Exception as error:
    raise _failure(address, error) from ConnectionError(str(error))


def server_failure(error: Exception) -> Exception:
  """Returns an error met while a file was read, as a `ConnectionError` if a web server caused it.

  Errors of aiohttp come from a web server. All other errors are returned unchanged.
  """
  is_of_server = type(error).__module__.partition(".")[0] == "aiohttp"
  return ConnectionError(str(error)) if is_of_server else error


def _failure(address, error):
  reason = " ".join(str(error.__cause__ or error).split())
  return InputError(
    f"{address}: cannot be read ({reason or type(error).__name__}); try again, or copy it here"
  )


def file_system(address: str):
  """Returns the fsspec file system of an address, and the file's name in that file system.

  Raises:
    InputError: the protocol is unknown, or the package for it is missing.
  """
  import fsspec  # slow to import, and rarely needed

  protocol = address.partition("://")[0]
  try:
    return fsspec.core.url_to_fs(address)
  except ImportError as error:
    package = _PACKAGES.get(protocol)
    remedy = f"pip install {package}" if package else str(error).strip()
    raise InputError(f"{address}: {protocol}:// needs one more package; {remedy}") from error
  except ValueError as error:
    raise InputError(
      f"{address}: {protocol}:// is an unknown protocol; use one such as https:// or gs://"
    ) from error
