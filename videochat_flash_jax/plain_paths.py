r"""Paths as Orbax and tensorstore take them: these read some letters in ways of their own.

`run [1]` is a pattern to Orbax, which then finds nothing there and saves nothing; `/gs/run` is the
name of a bucket to it; `a\b` is `a/b` to tensorstore, so that data go to another directory; and a
name that is not UTF-8 cannot be given to it at all.
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from videochat_flash_jax.errors import InputError

_PLAIN = re.compile(r"(?!/(?:gs|s3|az|hf)/)[\w/ .,+=@-]+")


def plain_path(directory: Path) -> Path:
  """Returns an absolute path of plain letters that leads to a directory.

  That is the path of the directory itself, or of a symbolic link to it. The link is in the folder
  for temporary files, and is removed when the process ends.

  Args:
    directory: the directory; it need not exist.

  Raises:
    InputError: the folder for temporary files has other letters in its own name.
  """
  directory = directory.absolute()
  return directory if _PLAIN.fullmatch(str(directory)) else _link_to(directory)


@functools.cache
def _link_to(directory: Path) -> Path:
  folder = tempfile.mkdtemp(prefix="vcflash_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if not _PLAIN.fullmatch(folder):
    raise InputError(
      f"{directory}: its name needs a link of plain letters, but that would be {folder}; "
      "set TMPDIR to a directory such as /tmp"
    )
  link = Path(folder, "link")
  link.symlink_to(directory)
  return link
