"""`config.json` of the released layout to our config, and back."""

import dataclasses
import json
import sys
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
  "head_dim": "head_size",
}
_OPTIONAL = {"tie_word_embeddings", "head_dim"}

_LARGEST = sys.float_info.max
# Type of a field of our config -> what its value has to be. A bool is no number here.
_VALUES = {
  int: ("a positive whole number", lambda value: type(value) is int and value > 0),
  float: ("a positive number", lambda value: type(value) in (int, float) and 0 < value <= _LARGEST),
  bool: ("true or false", lambda value: type(value) is bool),
  str: ("a text", lambda value: type(value) is str),
}


def _fixed_fields(vision: VisionConfig) -> dict:
  """Upstream's fields that ask for what the code does in one way only, with that way."""
  return {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
    "mm_llm_compress": False,
    "mm_local_num_frames": vision.clip_frames,
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_nopad",
    "mm_newline_position": "nothing",
    "vision_encode_type": "video_image",
  }


def read_config(directory: Path) -> VideoChatFlashConfig:
  """Reads `config.json` of a checkpoint directory.

  Raises:
    InputError: the file is missing, is not JSON, lacks a field, holds a value that cannot be, or
      asks for a part or a way of working that this package does not have.
  """
  path = directory / "config.json"
  if not path.is_file():
    raise InputError(f"{path}: no such file; a checkpoint directory needs its config.json")
  try:
    fields = json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from error
  if not isinstance(fields, dict):
    raise InputError(f"{path}: holds no JSON object; fetch the checkpoint again")
  own = fields.get(_OWN, {})
  if not isinstance(own, dict):
    raise InputError(f"{path}: field '{_OWN}' is no JSON object; leave it out, or mend it")
  unknown = sorted(set(own) - {"vision", "connector", "sampling"})
  if unknown:
    raise InputError(f"{path}: section '{_OWN}' has no part {', '.join(unknown)}; mend its name")
  decoder = _decoder_config(path, fields)
  if "vision" in own:
    vision = _own_part(path, own, "vision", VisionConfig)
  else:
    vision = _known_part(path, fields, "mm_vision_tower", _TOWERS)
  if "connector" in own:
    connector = _own_part(path, own, "connector", ConnectorConfig)
  else:
    connector = _known_part(path, fields, "mm_projector_type", _PROJECTORS)
  sampling = _own_part(path, own, "sampling", SamplingConfig)
  config = VideoChatFlashConfig(directory.name, vision, connector, decoder, sampling)
  _check_fixed(path, fields, vision)
  _check_multiples(path, config)
  return config


def _decoder_config(path, fields):
  missing = sorted(set(_DECODER_FIELDS) - _OPTIONAL - set(fields))
  if missing:
    raise InputError(f"{path}: fields missing: {', '.join(missing)}; add them")
  given = {theirs: fields[theirs] for theirs in _DECODER_FIELDS if theirs in fields}
  if given.get("head_dim", 0) is None:  # how some write that the default counts
    del given["head_dim"]
  values = {_DECODER_FIELDS[theirs]: value for theirs, value in given.items()}
  names = {ours: theirs for theirs, ours in _DECODER_FIELDS.items()}
  values = _checked(path, DecoderConfig, values, names)
  if "head_dim" not in given:
    if values["width"] % values["num_heads"]:
      raise InputError(
        f"{path}: field 'hidden_size' is no multiple of 'num_attention_heads'; "
        "mend them, or give 'head_dim'"
      )
    values["head_size"] = values["width"] // values["num_heads"]
  return DecoderConfig(**values)


def _known_part(path, fields, field, known):
  """The encoder or connector that `field` names."""
  name = fields.get(field)
  if not isinstance(name, str) or name not in known:
    raise InputError(f"{path}: field '{field}' is {name!r}; known: {', '.join(known)}")
  return known[name]


def _own_part(path, own, section, part):
  """The part of the config whose sizes are in our own section."""
  values = own.get(section, {})
  if not isinstance(values, dict):
    raise InputError(f"{path}: field '{_OWN}.{section}' is no JSON object; mend it")
  names = {field.name: f"{_OWN}.{section}.{field.name}" for field in dataclasses.fields(part)}
  values = _checked(path, part, values, names)
  try:
    return part(**values)
  except TypeError as error:  # a field is missing or unknown
    raise InputError(f"{path}: section '{_OWN}.{section}' does not fit: {error}") from error


def _checked(path, part, values, names):
  """Values of the types that the dataclass `part` declares; `names` are those in the file."""
  typed = dict(values)
  for field in dataclasses.fields(part):
    if field.name not in values:
      continue
    wanted, fits = _VALUES[field.type]
    if not fits(values[field.name]):
      found = f"field '{names[field.name]}' is {values[field.name]!r}"
      raise InputError(f"{path}: {found}; it has to be {wanted}")
    typed[field.name] = field.type(values[field.name])  # 1000000 for rope_theta is 1000000.0
  return typed


def _check_fixed(path, fields, vision):
  for field, fixed in _fixed_fields(vision).items():
    value = fields.get(field, fixed)
    if value != fixed and (value or fixed):  # null, false and {} all mean "off"
      raise InputError(
        f"{path}: field '{field}' is {value!r}; only {json.dumps(fixed)} is supported"
      )


def _check_multiples(path, config):
  vision, decoder, merge_heads = config.vision, config.decoder, config.connector.merge_heads
  for value, divisor, names in (
    (decoder.head_size, 2, "'head_dim', given or by default"),
    (decoder.num_heads, decoder.num_kv_heads, "'num_attention_heads' and 'num_key_value_heads'"),
    (vision.image_size, vision.patch_size, "'vision.image_size' and 'vision.patch_size'"),
    (vision.width, vision.num_heads, "'vision.width' and 'vision.num_heads'"),
    (vision.width, merge_heads, "'vision.width' and 'connector.merge_heads'"),
  ):
    if value % divisor:
      raise InputError(f"{path}: {names}: {value} has to be a multiple of {divisor}")


def write_config(config: VideoChatFlashConfig, directory: Path, *, dtype: str) -> None:
  """Writes `config.json` in the released layout; what upstream has no field for, beside it."""
  decoder = dataclasses.asdict(config.decoder)
  fields = {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
    "torch_dtype": dtype,
    **{theirs: decoder[ours] for theirs, ours in _DECODER_FIELDS.items()},
    **_fixed_fields(config.vision),
    "mm_hidden_size": config.vision.width,
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
