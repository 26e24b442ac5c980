r"""Paths for libraries that read some letters of a path in ways of their own.

`run [1]` is a pattern to Orbax, which then finds nothing there and saves nothing; `/gs/run` is the
name of a bucket to it; `a\b` is `a/b` to tensorstore, so that data go to another directory; and a
name that is not UTF-8 cannot be given to tensorstore, nor to tokenizers.
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from videochat_flash_jax.errors import InputError

_PLAIN = re.compile(r"(?!/(?:gs|s3|az|hf)/)[\w/ .,+=@-]+")


def plain_path(path: Path) -> Path:
  """Returns an absolute path of plain letters that leads to a file or a directory.

  That is its own path, or that of a symbolic link to it. The link is in the folder for temporary
  files, and is removed when the process ends.

  Args:
    path: of the file or the directory; it need not exist.

  Raises:
    InputError: the folder for temporary files has other letters in its own name.
  """
  path = path.absolute()
  return path if _PLAIN.fullmatch(str(path)) else _link_to(path)


@functools.cache
def _link_to(path: Path) -> Path:
  folder = tempfile.mkdtemp(dir=_folder_of_links())
  if not _PLAIN.fullmatch(folder):
    raise InputError(
      f"{path}: its name needs a link of plain letters, but that would be in {folder}; "
      "set TMPDIR to a directory such as /tmp"
    )
  link = Path(folder, "link")  # by the same name in all processes of a run
  link.symlink_to(path)
  return link


@functools.cache
def _folder_of_links() -> str:
  folder = tempfile.mkdtemp(prefix="vcflash_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder
