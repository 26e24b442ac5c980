"""Where files are kept that can be made again: `VCF_CACHE_DIR` moves them all."""

import os
from pathlib import Path

_VARIABLE = "VCF_CACHE_DIR"


def cache_folder(kind: str) -> Path:
  """The folder of a kind of files, in `VCF_CACHE_DIR` or else in ~/.cache/vcflash."""
  folder = os.environ.get(_VARIABLE) or Path.home() / ".cache" / "vcflash"
  return Path(folder).absolute() / kind


def hub_folder() -> Path | None:
  """Of models from the hub; None for the place that Hugging Face's own variables say."""
  return cache_folder("hub") if os.environ.get(_VARIABLE) else None
