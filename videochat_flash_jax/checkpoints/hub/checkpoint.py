"""A checkpoint of any kind that was opened, but whose tensors were not read yet."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from videochat_flash_jax.checkpoints.hub.hf_mapping import is_computed
from videochat_flash_jax.checkpoints.hub.safetensors_files import StoredTensor, fold_layers
from videochat_flash_jax.models.config import VideoChatFlashConfig

_log = logging.getLogger("videochat_flash_jax")


class Checkpoint(NamedTuple):
  """A checkpoint that was opened, but whose tensors were not read yet.

  Attributes:
    where: what it is called in error messages.
    directory: directory of its tokenizer.
    config: its config.
    fields: the fields of its config.json.
    tensors: its tensors by their names on the hub.
  """

  where: str
  directory: Path
  config: VideoChatFlashConfig
  fields: Mapping[str, Any]
  tensors: Mapping[str, StoredTensor]


def with_head(
  config: VideoChatFlashConfig, tensors: Mapping[str, StoredTensor]
) -> VideoChatFlashConfig:
  """Returns a config with untied embeddings if the checkpoint stores a head.

  The released 2B stores a head, although the config of its language model says that the embeddings
  are tied. The stored head is used.
  """
  if not config.decoder.tied_embeddings or "lm_head.weight" not in tensors:
    return config
  return dataclasses.replace(
    config, decoder=dataclasses.replace(config.decoder, tied_embeddings=False)
  )


def without_computed(
  where: Path | str, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
  """Returns the tensors that are weights, and logs once which of a checkpoint are ignored.

  Args:
    where: the checkpoint.
    tensors: its tensors by their names on the hub.
  """
  ignored = tuple(sorted(filter(is_computed, tensors)))
  if ignored:
    _log_ignored(str(where), ignored)
  return {name: tensor for name, tensor in tensors.items() if not is_computed(name)}


@functools.cache
def _log_ignored(where: str, names: tuple[str, ...]) -> None:
  _log.warning(
    "%s: ignored, since it follows from the config: %s", where, ", ".join(fold_layers(names))
  )
