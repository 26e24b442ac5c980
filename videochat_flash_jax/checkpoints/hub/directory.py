"""Finds the directory of a model by its name."""

import difflib
import os
import re
from importlib import resources
from pathlib import Path

from videochat_flash_jax.caches import hub_folder
from videochat_flash_jax.checkpoints.hub.other_files import DOWNLOADED, NEVER_DOWNLOADED
from videochat_flash_jax.checkpoints.hub.safetensors_files import is_whole
from videochat_flash_jax.errors import InputError

TINY = "tiny"
RELEASED = (
  "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",
  "OpenGVLab/VideoChat-Flash-Qwen2-7B_res224",
  "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
  "OpenGVLab/VideoChat-Flash-Qwen2_5-7B-1M_res224",
  "OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B",
)

_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_TOKENIZERS = ("tokenizer.json", "merges.txt", "tokenizer.model")


def checkpoint_directory(name: str | Path) -> Path:
  """Finds a checkpoint: the embedded "tiny", a local directory, or a model on the hub.

  A model on the hub is given as `owner/name`, or by the short name of a released one. If all of its
  files are in the local cache, they are used without any network access; otherwise the model is
  downloaded into the cache.

  Raises:
    InputError: there is no such model (the message suggests similar names), or it could not be
      downloaded.
  """
  if not isinstance(name, str | os.PathLike):
    raise InputError(f"{name!r:.80} is no model; give a name or a directory")
  if name == TINY:
    return Path(str(resources.files("videochat_flash_jax"))) / "assets" / TINY
  name = os.path.expanduser(name)
  if os.path.isdir(name):  # Path.is_dir raises if the name is too long, and treats "" like "."
    return Path(name)
  known = {TINY: TINY}
  for released in RELEASED:
    known |= {released: released, released.split("/")[1]: released}
  if str(name) in known:
    return _cached_or_downloaded(known[str(name)])
  if _REPOSITORY.fullmatch(str(name)):
    return _cached_or_downloaded(str(name))
  raise InputError(
    f"{str(name)[:100]!r:.80}: no such model or directory; did you mean {_near(name, known)}?"
  )


def _near(name, known):
  lowered = {spelling.lower(): spelling for spelling in known}
  near = difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.4)
  return ", ".join(lowered[spelling] for spelling in near) or ", ".join((TINY, *RELEASED))


def _cached_or_downloaded(repository):
  import huggingface_hub  # slow to import, and rarely needed

  def snapshot(**options):
    """Returns the directory of the repository's files in the local cache."""
    patterns = {"allow_patterns": DOWNLOADED, "ignore_patterns": NEVER_DOWNLOADED}
    folder = hub_folder()
    return Path(
      huggingface_hub.snapshot_download(repository, cache_dir=folder, **patterns, **options)
    )

  try:
    cached = snapshot(local_files_only=True)
    if _is_whole(cached):
      return cached
  except Exception:  # any error means that it is not in the cache
    pass
  try:
    downloaded = snapshot()
  except Exception as error:  # from many libraries: no network, no such file, no permission
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{repository}: no such directory, not in the local hub cache, and it could not be "
      f"downloaded ({reason}); give the directory of a copy"
    ) from error
  if not _is_whole(downloaded):  # the library returns this if a download was interrupted
    raise InputError(
      f"{repository}: weights (safetensors) or tokenizer are missing in {downloaded}; try again "
      "with a network connection, or give the directory of a copy"
    )
  return downloaded


def _is_whole(directory):
  return is_whole(directory) and any((directory / name).is_file() for name in _TOKENIZERS)
