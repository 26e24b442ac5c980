"""The files of a checkpoint other than its weights and its config.json.

They are copied unchanged into every checkpoint and every run that is made from it: the tokenizer
with its chat templates, the configs of processors and of generation, licence and model card, and
the original's code. A file is known by its kind, not by its name in full, since a tokenizer may
have files that this package does not read.

What belongs to the weights stays where it is: the index of their files, adapters that were not
merged, and the state of a training. So do hidden files, and folders with other files than chat
templates.
"""

import errno
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from videochat_flash_jax.errors import InputError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _any_case(name):
  """The pattern that matches a name in capital and in small letters."""
  return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in name)


_TOKENIZER = (
  *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
  *("*merges*.txt", "*vocab*.txt", "dict.txt", "*.codes"),
)
_PAPERS = tuple(
  f"*{_any_case(word)}*"
  for word in (
    *("readme", "model_card", "license", "licence", "copying", "copyright", "notice"),
    *("agreement", "terms", "use_policy", "acceptable_use"),
  )
)
# What is downloaded: never code, nor pickles, which could run code.
DOWNLOADED = ("*.safetensors", *_TOKENIZER, *_PAPERS)
NEVER_DOWNLOADED = ("*.py", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth")
_COPIED = (*_TOKENIZER, *_PAPERS, "*.py")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json", "trainer_state.json", ".*")


def copy_other_files(source: Path, target: Path) -> None:
  """Copies the files of a checkpoint other than its weights and its config.json; see the module.

  Links are followed, as in the cache of the hub.

  Args:
    source: directory of the checkpoint.
    target: an existing directory.

  Raises:
    InputError: a file cannot be read.
    OSError: a file cannot be written since the disk is full.
  """
  for path in (*source.iterdir(), *source.glob("[!.]*/*.jinja")):
    is_copied = any(fnmatchcase(path.name, pattern) for pattern in _COPIED)
    if not is_copied or any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED):
      continue
    if path.is_file() or path.is_symlink():
      copy = target / path.relative_to(source)
      copy.parent.mkdir(exist_ok=True)
      _copy(path, copy)


def _copy(path, copy):
  try:
    shutil.copyfile(path, copy)
  except IsADirectoryError:  # a link to a folder
    pass
  except OSError as error:
    if error.errno in FULL_DISK:
      raise
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); download the checkpoint again, or remove this "
      "file"
    ) from error
