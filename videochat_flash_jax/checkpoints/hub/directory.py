"""From the name of a model to the directory that holds it."""

import difflib
import os
import re
from importlib import resources
from pathlib import Path

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
# Configs, weights, tokenizer: never code, and never a file that has to be unpickled.
_FETCHED = ("*.json", "*.safetensors", "merges.txt", "tokenizer.model")
_TOKENIZERS = ("tokenizer.json", "merges.txt", "tokenizer.model")


def checkpoint_directory(name: str | Path) -> Path:
  """Finds a checkpoint: the embedded "tiny", a local directory, or a model on the hub.

  A model on the hub, `owner/name` or the short name of a released one, is taken from the local
  cache if it is there whole, without asking the network; else it is fetched into the cache.

  Raises:
    InputError: no such model, with near names; or it could not be fetched.
  """
  if name == TINY:
    return Path(str(resources.files("videochat_flash_jax"))) / "assets" / TINY
  if os.path.isdir(name):  # Path.is_dir raises for a name too long, and takes "" for "."
    return Path(name)
  known = {TINY: TINY}
  for released in RELEASED:
    known |= {released: released, released.split("/")[1]: released}
  if str(name) in known:
    return _cached_or_fetched(known[str(name)])
  if _REPOSITORY.fullmatch(str(name)):
    return _cached_or_fetched(str(name))
  raise InputError(
    f"{str(name)[:100]!r}: no such model or directory; did you mean {_near(name, known)}?"
  )


def _near(name, known):
  lowered = {spelling.lower(): spelling for spelling in known}
  near = difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.4)
  return ", ".join(lowered[spelling] for spelling in near) or ", ".join((TINY, *RELEASED))


def _cached_or_fetched(repository):
  import huggingface_hub  # slow to import, and seldom needed

  def snapshot(**options):
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_FETCHED, **options))

  try:
    cached = snapshot(local_files_only=True)
    if _is_whole(cached):
      return cached
  except Exception:  # of whatever kind: it is not in the cache
    pass
  try:
    fetched = snapshot()
  except Exception as error:  # of many libraries: no network, no such file, no right to read
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{repository}: no such directory, not in the local hub cache, and it could not be fetched "
      f"({reason}); give the directory of a copy"
    ) from error
  if not _is_whole(fetched):  # what the library gives where a download broke off
    raise InputError(
      f"{repository}: weights (safetensors) or tokenizer are missing in {fetched}; try again "
      "with a network, or give the directory of a copy"
    )
  return fetched


def _is_whole(directory):
  return is_whole(directory) and any((directory / name).is_file() for name in _TOKENIZERS)
