"""`config.json` of the released layout to our config, and back."""

import dataclasses
import json
from pathlib import Path

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import (
  ConnectorConfig,
  DecoderConfig,
  SamplingConfig,
  VideoChatFlashConfig,
  VisionConfig,
)

_TOWERS = {
  "umt-large": VideoChatFlashConfig.qwen2_7b_res224().vision,
  "umt-hd-large": VideoChatFlashConfig.qwen2_7b_res448().vision,
  "internvideo2": VideoChatFlashConfig.qwen2_5_7b_internvideo2_1b().vision,
}
_PROJECTORS = {"tome16_mlp_hd64": ConnectorConfig()}
_OWN = "videochat_flash_jax"  # our section: sizes that upstream's fields cannot express

# Upstream's field -> ours.
_DECODER_FIELDS = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "intermediate_size": "mlp_width",
  "rope_theta": "rope_theta",
  "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tied_embeddings",
  "max_position_embeddings": "max_positions",
}


def read_config(directory: Path) -> VideoChatFlashConfig:
  """Reads `config.json` of a checkpoint directory.

  Raises:
    InputError: the file is missing, is not JSON, lacks a field, or asks for a part that this
      package does not have.
  """
  path = directory / "config.json"
  if not path.is_file():
    raise InputError(f"{path}: no such file; a checkpoint directory needs its config.json")
  try:
    fields = json.loads(path.read_text())
  except ValueError as error:
    raise InputError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from error
  if not isinstance(fields, dict):
    raise InputError(f"{path}: holds no JSON object; fetch the checkpoint again")
  own = fields.get(_OWN, {})
  for field in ("rope_scaling", "mm_llm_compress", "use_sliding_window"):
    if fields.get(field):
      raise InputError(f"{path}: field '{field}' is set; it is not supported yet, set it to null")
  try:
    decoder = _decoder_config(path, fields)
    vision = _part(path, fields, "mm_vision_tower", _TOWERS, own.get("vision"))
    connector = _part(path, fields, "mm_projector_type", _PROJECTORS, own.get("connector"))
    sampling = SamplingConfig(**own.get("sampling", {}))
  except TypeError as error:
    raise InputError(f"{path}: section '{_OWN}' does not fit: {error}") from error
  return VideoChatFlashConfig(directory.name, vision, connector, decoder, sampling)


def _decoder_config(path, fields):
  missing = sorted(set(_DECODER_FIELDS) - {"tie_word_embeddings"} - set(fields))
  if missing:
    raise InputError(f"{path}: fields missing: {', '.join(missing)}; add them")
  values = {ours: fields[theirs] for theirs, ours in _DECODER_FIELDS.items() if theirs in fields}
  head_size = fields.get("head_dim") or values["width"] // values["num_heads"]
  return DecoderConfig(head_size=head_size, **values)


def _part(path, fields, field, known, own):
  """The encoder or connector that `field` names, or the sizes in our own section."""
  if own is not None:
    return (VisionConfig if known is _TOWERS else ConnectorConfig)(**own)
  name = fields.get(field)
  if name not in known:
    raise InputError(f"{path}: field '{field}' is {name!r}; known: {', '.join(known)}")
  return known[name]


def write_config(config: VideoChatFlashConfig, directory: Path, *, dtype: str) -> None:
  """Writes `config.json` in the released layout; what upstream has no field for, beside it."""
  decoder = dataclasses.asdict(config.decoder)
  fields = {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
    "hidden_act": "silu",
    "torch_dtype": dtype,
    "head_dim": config.decoder.head_size,
    **{theirs: decoder[ours] for theirs, ours in _DECODER_FIELDS.items()},
    "rope_scaling": None,
    "mm_llm_compress": False,
    "mm_hidden_size": config.vision.width,
    "mm_local_num_frames": config.vision.clip_frames,
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_nopad",
    "mm_newline_position": "nothing",
    "vision_encode_type": "video_image",
    "tokenizer_model_max_length": config.decoder.max_positions,
    "tokenizer_padding_side": "right",
  }
  own = {"sampling": dataclasses.asdict(config.sampling)}
  tower = next((name for name, known in _TOWERS.items() if known == config.vision), None)
  projector = next((name for name, known in _PROJECTORS.items() if known == config.connector), None)
  if tower is None:
    own["vision"] = dataclasses.asdict(config.vision)
  if projector is None:
    own["connector"] = dataclasses.asdict(config.connector)
  fields |= {"mm_vision_tower": tower or "own", "mm_projector_type": projector or "own", _OWN: own}
  (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
