"""A checkpoint that was opened, but not read, wherever its tensors are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from videochat_flash_jax.checkpoints.hub.safetensors_files import StoredTensor
from videochat_flash_jax.models.config import VideoChatFlashConfig


class Checkpoint(NamedTuple):
  """A checkpoint that was opened, but not read."""

  where: str  # for messages
  directory: Path  # of its tokenizer
  config: VideoChatFlashConfig
  fields: Mapping[str, Any]  # of its config.json
  tensors: Mapping[str, StoredTensor]  # by their names on the hub


def with_head(
  config: VideoChatFlashConfig, tensors: Mapping[str, StoredTensor]
) -> VideoChatFlashConfig:
  """A stored head counts, as in the released 2B, whatever the language model's config says."""
  if not config.decoder.tied_embeddings or "lm_head.weight" not in tensors:
    return config
  return dataclasses.replace(
    config, decoder=dataclasses.replace(config.decoder, tied_embeddings=False)
  )
