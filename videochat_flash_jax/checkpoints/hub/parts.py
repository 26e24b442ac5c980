"""Joins a language model, a raw encoder and optionally a projector into one checkpoint."""

import os
import re
from pathlib import Path

import numpy as np

from videochat_flash_jax.checkpoints.hub.checkpoint import (
  Checkpoint,
  with_head,
  without_computed,
)
from videochat_flash_jax.checkpoints.hub.hf_config import TOWERS, read_decoder_config, read_fields
from videochat_flash_jax.checkpoints.hub.safetensors_files import (
  StoredTensor,
  read_directory,
  read_file,
)
from videochat_flash_jax.checkpoints.hub.torch_files import is_torch_file, read_torch_file
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import (
  ConnectorConfig,
  DecoderConfig,
  VideoChatFlashConfig,
  VisionConfig,
)

_ENCODER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."
# Names of weights that were only used in the pre-training of the encoders begin like this. No
# VideoChat-Flash has them.
_PRETRAINING = {"umt": r"(?!encoder\.)", "internvideo2": r"(?:clip|final_clip|mae)_"}


def missing_parts(checkpoint: Checkpoint) -> list[str]:
  """The parts of a model of which a checkpoint has no tensor, in words."""
  starts = {"encoder": _ENCODER, "projector": _PROJECTOR, "language model": "model.layers."}
  return [
    part
    for part, start in starts.items()
    if not any(name.startswith(start) for name in checkpoint.tensors)
  ]


def with_head_of_embedding(checkpoint: Checkpoint) -> Checkpoint:
  """The same checkpoint with its embedding as its head, too."""
  head = checkpoint.tensors["model.embed_tokens.weight"]
  return checkpoint._replace(tensors={**checkpoint.tensors, "lm_head.weight": head})


def join_parts(
  language_model: Path,
  encoder: Path,
  tower: str | VisionConfig,
  projector: Path | None = None,
  seed: int = 0,
) -> Checkpoint:
  """Returns a complete VideoChat-Flash checkpoint, which `write_checkpoint` can write.

  Args:
    language_model: directory of a Qwen2 model in the format of the hub, with its tokenizer.
    encoder: `UMT-L_f4_vision.pt`, `InternVideo2-1B_f4_vision.pt`, or a similar file.
    tower: upstream's name for the encoder and its picture size, as in `TOWERS`; or its config.
    projector: `mm_projector.bin` of a first training stage. With None (the default) its weights are
      drawn at random, from the same distribution as in the original.
    seed: seed of these random weights.

  Raises:
    InputError: a file is missing, broken, or of another kind.
  """
  path, fields = language_model / "config.json", read_fields(language_model)
  if fields.get("model_type") != "qwen2":
    kind = fields.get("model_type")
    raise InputError(f"{path}: field 'model_type' is {kind!r:.80}; give a Qwen2 language model")
  decoder = read_decoder_config(path, fields)
  vision = tower if isinstance(tower, VisionConfig) else TOWERS[tower]
  tensors = read_directory(language_model) | _encoder_tensors(encoder, vision)
  if projector is None:
    tensors |= _fresh_projector(vision, decoder, seed)
  else:
    tensors |= {
      re.sub(r".*\bmm_projector\.", _PROJECTOR, name): tensor
      for name, tensor in _read(projector).items()
    }
  config = VideoChatFlashConfig(language_model.name, vision, ConnectorConfig(), decoder)
  where = " + ".join(map(str, filter(None, (language_model, encoder, projector))))
  tensors = without_computed(where, tensors)
  return Checkpoint(where, language_model, with_head(config, tensors), fields, tensors)


def _encoder_tensors(path: Path, vision: VisionConfig) -> dict[str, StoredTensor]:
  """The tensors of an encoder that the model uses, under the names they have in a checkpoint.

  encoder.norm.weight              the last norm; is renamed to vision_layernorm
  encoder.blocks.23.norm1.weight   is left out: the model uses 23 of the 24 blocks
  decoder.blocks.0.norm1.weight    is left out: it belongs to the pre-training
  """
  tensors = {}
  for name, tensor in _read(path).items():
    block = re.search(r"\bblocks\.(\d+)\.", name)
    if re.match(_PRETRAINING[vision.kind], name) or (block and int(block[1]) >= vision.depth):
      continue
    name = re.sub(r"^encoder\.norm\.", "encoder.vision_layernorm.", name)
    tensors[_ENCODER + name] = tensor
  return tensors


def _fresh_projector(vision: VisionConfig, decoder: DecoderConfig, seed: int):
  """Random weights of two linear layers, as torch draws them: uniform within 1 / sqrt(fan_in)."""
  rng, tensors = np.random.default_rng(seed), {}
  for index, fan_in in ((0, vision.width), (2, decoder.width)):
    for name, shape in (("weight", (decoder.width, fan_in)), ("bias", (decoder.width,))):
      values = rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(fan_in**0.5)
      tensors[f"{_PROJECTOR}mlp.{index}.{name}"] = StoredTensor.of(values)
  return tensors


def _read(path: Path) -> dict[str, StoredTensor]:
  if not os.path.isfile(path):  # Path.is_file raises an error if the name is too long
    raise InputError(f"{path}: no such file; check the path")
  if is_torch_file(path):
    return read_torch_file(path)
  if path.suffix == ".safetensors":
    return read_file(path)
  raise InputError(f"{path}: give a .safetensors file or a PyTorch file (.pt, .pth, .bin)")
