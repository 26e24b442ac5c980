"""A whole checkpoint out of parts: a language model, a raw encoder and perhaps a projector."""

import os
import re
from pathlib import Path

import numpy as np

from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint, with_head
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
# Parts of the encoders' own pre-training that no VideoChat-Flash has, as they begin in the files.
_PRETRAINING = {"umt": r"(?!encoder\.)", "internvideo2": r"(?:clip|final_clip|mae)_"}


def join_parts(
  language_model: Path,
  encoder: Path,
  tower: str | VisionConfig,
  projector: Path | None = None,
  seed: int = 0,
) -> Checkpoint:
  """A whole VideoChat-Flash, to be written by `write_checkpoint`.

  Args:
    language_model: directory of a Qwen2 model as it is on the hub, with its tokenizer.
    encoder: `UMT-L_f4_vision.pt`, `InternVideo2-1B_f4_vision.pt`, or one of their kind.
    tower: upstream's name of the encoder and its picture size, as in `TOWERS`; or its sizes.
    projector: `mm_projector.bin` of a first training stage; by default (None) its weights are
      drawn at random, as the original draws them.
    seed: of those.

  Raises:
    InputError: a file is missing, broken, or of another kind.
  """
  path, fields = language_model / "config.json", read_fields(language_model)
  if fields.get("model_type") != "qwen2":
    kind = fields.get("model_type")
    raise InputError(f"{path}: field 'model_type' is {kind!r}; give a Qwen2 language model")
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
  return Checkpoint(where, language_model, with_head(config, tensors), fields, tensors)


def _encoder_tensors(path: Path, vision: VisionConfig) -> dict[str, StoredTensor]:
  """What the model builds of an encoder, under the names that it has there.

  encoder.norm.weight              the last norm, called vision_layernorm in the model
  encoder.blocks.23.norm1.weight   of 24 blocks the model builds 23
  decoder.blocks.0.norm1.weight    of the pre-training
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
  """Two linear layers as torch draws them: uniform within 1 / sqrt(inputs)."""
  rng, tensors = np.random.default_rng(seed), {}
  for index, inputs in ((0, vision.width), (2, decoder.width)):
    for name, shape in (("weight", (decoder.width, inputs)), ("bias", (decoder.width,))):
      values = rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(inputs**0.5)
      tensors[f"{_PROJECTOR}mlp.{index}.{name}"] = StoredTensor.of(values)
  return tensors


def _read(path: Path) -> dict[str, StoredTensor]:
  if not os.path.isfile(path):  # Path.is_file raises for a name too long
    raise InputError(f"{path}: no such file")
  if is_torch_file(path):
    return read_torch_file(path)
  if path.suffix == ".safetensors":
    return read_file(path)
  raise InputError(f"{path}: neither .safetensors nor a file of torch (.pt, .pth, .bin)")
