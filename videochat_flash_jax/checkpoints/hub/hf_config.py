"""Translates `config.json` of the released format to our config, and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videochat_flash_jax.checkpoints.hub import hf_options
from videochat_flash_jax.checkpoints.hub.typed_fields import agreed, checked, unique
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import (
  ConnectorConfig,
  DecoderConfig,
  SamplingConfig,
  VideoChatFlashConfig,
  VisionConfig,
)

TOWERS = {
  "umt-large": VideoChatFlashConfig.qwen2_7b_res224().vision,
  "umt-hd-large": VideoChatFlashConfig.qwen2_7b_res448().vision,
  "internvideo2": VideoChatFlashConfig.qwen2_5_7b_internvideo2_1b().vision,
}
_PROJECTORS = {"tome16_mlp_hd64": ConnectorConfig()}
_OWN = "videochat_flash_jax"  # our section of the file: sizes that upstream's fields cannot express

# Upstream's field -> field of our config.
_DECODER_FIELDS = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "intermediate_size": "mlp_width",
  "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tied_embeddings",
  "max_position_embeddings": "max_positions",
  "head_dim": "head_size",
}
_OPTIONAL = {"tie_word_embeddings", "head_dim"}
_DTYPES = ("torch_dtype", "dtype")  # the second one is what newer versions of transformers write

# Fields that the original's code also reads, with the values of the released 7B model. They are
# written if our config was not read from a file. The kind of dropout is only used if dropout is on.
_UNMODELLED = {
  "attention_dropout": 0.0,
  "auto_map": {
    "AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig",
    "AutoModel": "modeling_videochat_flash.VideoChatFlashQwenForCausalLM",
  },
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "initializer_range": 0.02,
  "llm_compress_type": "attention",
  "llm_compress_layer_list": [24],
  "llm_image_token_ratio_list": [1.0, 0.5],
  "mm_pos_num_frames": 8,
  "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter",  # the tower's weights are in the files
  "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False,
  "mm_vision_select_feature": "patch",
  "pos_skipping_range": 4096,
  "sliding_window": 131072,
  "transformers_version": "4.40.1",
  "use_cache": True,
  "use_mm_proj": True,
  "use_pos_skipping": False,
}


# Upstream's fields for which this package supports one value only, with that value.
_FIXED_OF_DECODER = {
  "hidden_act": "silu",
  "use_sliding_window": False,
  "text_config": None,
}


def _fixed_fields(vision: VisionConfig) -> dict:
  """As `_FIXED_OF_DECODER`, for the other parts."""
  return {
    "frame_aspect_ratio": "square",
    "image_aspect_ratio": "anyres_nopad",
    "mm_local_num_frames": vision.clip_frames,
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_nopad",
    "mm_newline_position": "nothing",
    "vision_encode_type": "video_image",
  }


def read_fields(directory: Path) -> dict[str, Any]:
  """Reads the fields of `config.json` in a directory, without any translation.

  Raises:
    InputError: the file is missing, or is not JSON.
  """
  path = directory / "config.json"
  if not path.is_file():
    raise InputError(f"{path}: no such file; a checkpoint directory needs its config.json")
  try:
    fields = json.loads(path.read_bytes(), object_pairs_hook=unique)
  except (ValueError, RecursionError, OSError) as error:
    raise InputError(f"{path}: not valid JSON ({error}); download the checkpoint again") from error
  if not isinstance(fields, dict):
    raise InputError(f"{path}: holds no JSON object; download the checkpoint again")
  return fields


def read_config(directory: Path) -> VideoChatFlashConfig:
  """Reads `config.json` of a checkpoint directory as our config.

  The context (`max_positions`) is `max_position_embeddings`, or the longer context that YaRN gives.
  The field `tokenizer_model_max_length` is ignored: it is only the length at which the original
  cuts prompts.

  Raises:
    InputError: the file is missing, is not JSON, lacks a field, holds an impossible value, or needs
      a part or a feature that this package does not have.
  """
  return parse_config(directory, read_fields(directory))


def parse_config(directory: Path, fields: Mapping[str, Any]) -> VideoChatFlashConfig:
  """Translates the fields of a directory's config.json to our config; see `read_config`."""
  path = directory / "config.json"
  if fields.get("model_type") == "qwen2":
    raise InputError(
      f"{path}: a language model alone; join it with an encoder: vcflash convert --encoder FILE"
    )
  own = fields.get(_OWN, {})
  if not isinstance(own, dict):
    raise InputError(f"{path}: field '{_OWN}' is no JSON object; leave it out, or correct it")
  unknown = sorted(set(own) - {"vision", "connector", "sampling", "max_positions"})
  if unknown:
    raise InputError(f"{path}: section '{_OWN}' has no part {', '.join(unknown)}; correct its name")
  decoder = read_decoder_config(path, fields, own.get("max_positions"))
  if "vision" in own:
    vision = _own_part(path, own, "vision", VisionConfig)
  else:
    vision = _known_part(path, fields, "mm_vision_tower", TOWERS)
  if "connector" in own:
    connector = _own_part(path, own, "connector", ConnectorConfig)
  else:
    connector = _known_part(path, fields, "mm_projector_type", _PROJECTORS)
  config = VideoChatFlashConfig(
    name=_name(directory),
    vision=vision,
    connector=connector,
    decoder=decoder,
    sampling=_own_part(path, own, "sampling", SamplingConfig),
    tiling=hf_options.read_tiling(path, fields, vision.image_size),
    dropout=hf_options.read_dropout(path, fields, decoder.depth),
  )
  _check_fixed(path, fields, _fixed_fields(vision))
  _check_multiples(path, config)
  _check_stated_twice(path, fields, config)
  return config


def _name(directory):
  """Name of the directory, or of the repository if it is a snapshot in the hub's cache."""
  if directory.parent.name == "snapshots":
    return directory.parent.parent.name.split("--")[-1]
  return directory.name


def read_decoder_config(
  path: Path, fields: Mapping[str, Any], own_positions: Any = None
) -> DecoderConfig:
  """Returns the config of the language model; fields about other parts are ignored.

  Args:
    path: the file, for error messages.
    fields: fields of a config.json.
    own_positions: the context from our own section of the file; None if it is not given there.

  Raises:
    InputError: a field is missing, or holds an impossible value.
  """
  theta_name, theta, yarn = hf_options.read_rope(path, fields)
  missing = set(_DECODER_FIELDS) - _OPTIONAL - set(fields)
  missing = sorted(missing | ({theta_name} if theta is None else set()))
  if missing:
    raise InputError(f"{path}: fields missing: {', '.join(missing)}; add them")
  given = {theirs: fields[theirs] for theirs in _DECODER_FIELDS if theirs in fields}
  if given.get("head_dim", 0) is None:  # some files write null for the default
    del given["head_dim"]
  values = {_DECODER_FIELDS[theirs]: value for theirs, value in given.items()}
  names = {ours: theirs for theirs, ours in _DECODER_FIELDS.items()} | {"rope_theta": theta_name}
  values = checked(path, DecoderConfig, values | {"rope_theta": theta}, names)
  if "head_dim" not in given:
    if values["width"] % values["num_heads"]:
      raise InputError(
        f"{path}: field 'hidden_size' is no multiple of 'num_attention_heads'; "
        "correct them, or give 'head_dim'"
      )
    values["head_size"] = values["width"] // values["num_heads"]
  _check_fixed(path, fields, _FIXED_OF_DECODER)
  hf_options.check_quantization(path, fields)
  _check_layer_types(path, fields, values["depth"])
  stated_dtype(path, fields)
  if own_positions is not None:
    own = {"max_position_embeddings": values["max_positions"]}
    agreed(path, own | {f"{_OWN}.max_positions": own_positions})
  elif yarn is not None:
    extended = int(yarn.factor * yarn.original_positions)
    values["max_positions"] = max(values["max_positions"], extended)
  return DecoderConfig(**values, yarn=yarn)


def _known_part(path, fields, field, known):
  """The encoder or connector that `field` names."""
  name = fields.get(field)
  if not isinstance(name, str) or name not in known:
    raise InputError(f"{path}: field '{field}' is {name!r:.80}; give one of {', '.join(known)}")
  return known[name]


def _own_part(path, own, section, part):
  """A part of the config whose sizes are given in our own section of the file."""
  values = own.get(section, {})
  if not isinstance(values, dict):
    raise InputError(f"{path}: field '{_OWN}.{section}' is no JSON object; correct it")
  names = {field.name: f"{_OWN}.{section}.{field.name}" for field in dataclasses.fields(part)}
  values = checked(path, part, values, names)
  try:
    return part(**values)
  except TypeError as error:  # a field is missing or unknown
    raise InputError(
      f"{path}: section '{_OWN}.{section}' does not fit ({error}); correct its fields"
    ) from error


def _check_fixed(path, fields, supported):
  for field, fixed in supported.items():
    value = fields.get(field, fixed)
    if value != fixed and (value or fixed):  # null, false and {} all mean "off"
      raise InputError(
        f"{path}: field '{field}' is {value!r:.80}; only {json.dumps(fixed)} is supported"
      )


def _check_layer_types(path, fields, depth):
  """Refuses layers whose attention has a window; `use_sliding_window` alone need not tell."""
  kinds = fields.get("layer_types")
  if kinds is not None and kinds != ["full_attention"] * depth:
    raise InputError(
      f"{path}: field 'layer_types' is {kinds!r:.80}; only full_attention is supported, once for "
      f"each of the {depth} layers"
    )


def stated_dtype(path: Path, fields: Mapping[str, Any]) -> str | None:
  """Returns the dtype that a config.json states, such as `bfloat16`; None if it states none.

  Raises:
    InputError: it states two.
  """
  stated = {name: fields[name] for name in _DTYPES if fields.get(name)}
  plain = {name: str(dtype).removeprefix("torch.") for name, dtype in stated.items()}
  return agreed(path, plain, stated)


def _check_stated_twice(path, fields, config):
  """Refuses a file that says one thing here and another thing there."""
  own = fields.get(_OWN, {})
  for name, known, part in (
    ("mm_vision_tower", TOWERS, "vision"),
    ("mm_projector_type", _PROJECTORS, "connector"),
  ):
    if part in own and fields.get(name) in [*known]:  # which may be compared with anything
      values = {name: known[fields[name]], f"{_OWN}.{part}": getattr(config, part)}
      agreed(path, values, {name: fields[name], f"{_OWN}.{part}": own[part]})
  width = fields.get("mm_hidden_size")
  if width is not None and width != config.vision.width:
    raise InputError(
      f"{path}: field 'mm_hidden_size' ({width!r:.80}) contradicts the encoder, whose width is "
      f"{config.vision.width}; correct it, or remove it"
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


def write_config(
  config: VideoChatFlashConfig,
  directory: Path,
  *,
  dtype: str,
  base: Mapping[str, Any] | None = None,
) -> None:
  """Writes `config.json` in the released format.

  What upstream has no field for is written into a section of our own.

  Args:
    config: the config to write.
    directory: the directory to write it to.
    dtype: dtype of the weights, such as `bfloat16`.
    base: fields of an earlier config.json. Fields that this package does not know are kept. If they
      describe the same config as `config`, all of them are kept, but for `dtype` and
      `rope_parameters`: these are written as the fields that every version of transformers reads.
  """
  fields = dict(base or {})
  before = parse_config(directory, fields) if "mm_vision_tower" in fields else None
  fields.pop("dtype", None)
  if fields.pop("rope_parameters", None) or "rope_theta" not in fields:
    fields |= hf_options.rope_fields(config.decoder.rope_theta, config.decoder.yarn)
  if before is None or dataclasses.replace(before, name=config.name) != config:
    derived = (_OWN, "head_dim", "layer_types")
    fields = {field: value for field, value in fields.items() if field not in derived}
    changed = _upstream_fields(config)
    # With sizes that upstream does not know, the original's code cannot be used anyway.
    unmodelled = {} if "own" in changed.values() else _UNMODELLED
    fields = {**unmodelled, **fields, **changed, **_own_section(config)}
    if before is None or before.decoder.max_positions != config.decoder.max_positions:
      fields["tokenizer_model_max_length"] = config.decoder.max_positions
  text = json.dumps(fields | {"torch_dtype": dtype}, indent=2, sort_keys=True)
  (directory / "config.json").write_text(text + "\n")


def _upstream_fields(config):
  decoder = {theirs: getattr(config.decoder, ours) for theirs, ours in _DECODER_FIELDS.items()}
  if config.decoder.head_size * config.decoder.num_heads == config.decoder.width:
    del decoder["head_dim"]
  return {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
    **decoder,
    "hidden_act": "silu",
    "use_sliding_window": False,
    **_fixed_fields(config.vision),
    **hf_options.rope_fields(config.decoder.rope_theta, config.decoder.yarn),
    **hf_options.option_fields(config.dropout, config.tiling, config.vision.image_size),
    "max_window_layers": config.decoder.depth,
    "mm_hidden_size": config.vision.width,
    "mm_vision_tower": _known_name(TOWERS, config.vision),
    "mm_projector_type": _known_name(_PROJECTORS, config.connector),
    "tokenizer_padding_side": "right",
  }


def _own_section(config):
  """Our own section with what upstream's fields cannot express; {} if there is nothing."""
  own, yarn = {}, config.decoder.yarn
  if config.sampling != SamplingConfig():
    own["sampling"] = dataclasses.asdict(config.sampling)
  if _known_name(TOWERS, config.vision) == "own":
    own["vision"] = dataclasses.asdict(config.vision)
  if _known_name(_PROJECTORS, config.connector) == "own":
    own["connector"] = dataclasses.asdict(config.connector)
  if yarn and config.decoder.max_positions < int(yarn.factor * yarn.original_positions):
    own["max_positions"] = config.decoder.max_positions
  return {_OWN: own} if own else {}


def _known_name(known, part):
  return next((name for name, config in known.items() if config == part), "own")
