"""From the name of a model to the directory that holds it."""

import difflib
import os
from importlib import resources
from pathlib import Path

from videochat_flash_jax.errors import InputError

TINY = "tiny"
RELEASED = (
  "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",
  "OpenGVLab/VideoChat-Flash-Qwen2-7B_res224",
  "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
  "OpenGVLab/VideoChat-Flash-Qwen2_5-7B-1M_res224",
  "OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B",
)


def checkpoint_directory(name: str | Path) -> Path:
  """Finds a checkpoint: the embedded "tiny", a local directory, or a released model.

  A released model is taken from the local hub cache, or fetched into it; only configs, weights
  and tokenizer files are, never code.

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
    return _fetch(known[str(name)])
  lowered = {spelling.lower(): spelling for spelling in known}
  near = difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.4)
  suggestion = ", ".join(lowered[spelling] for spelling in near) or ", ".join((TINY, *RELEASED))
  raise InputError(f"{str(name)[:100]!r}: no such model or directory; did you mean {suggestion}?")


def _fetch(repository):
  import huggingface_hub  # slow to import, and seldom needed

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repository, allow_patterns=["*.json", "*.safetensors", "merges.txt"]
      )
    )
  except Exception as error:  # of many libraries: no network, no such file, no right to read
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{repository}: not in the local hub cache and could not be fetched ({reason}); "
      "give the directory of a copy"
    ) from error
