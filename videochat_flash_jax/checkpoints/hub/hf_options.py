"""Translates parts of `config.json`: rotary positions, dropout, image tiling and int8 weights.

Every function takes the fields of the file, and its path for error messages. An `InputError` names
the field, its value, and the values that are allowed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from videochat_flash_jax.checkpoints.hub.typed_fields import agreed
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import (
  DROPOUT_KINDS,
  DropoutConfig,
  TilingConfig,
  YarnConfig,
)

# Upstream's fields for rotary positions. Newer versions of transformers write the second one, which
# also holds `rope_theta`; both can be read.
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")
# Options of rotary positions for which this package supports one value only, with that value.
_FIXED_ROPE = {"partial_rotary_factor": 1}
_FIXED_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}

_QUANTIZATION = "quantization_config"
# The field of a checkpoint with int8 weights. No other program knows the method, so none mistakes
# the int8 values for weights.
INT8_FIELD = {_QUANTIZATION: {"quant_method": "videochat_flash_jax", "weights": "int8"}}


def check_quantization(path: Path, fields: Mapping[str, Any]) -> None:
  """Refuses weights of fewer bits, unless they are int8 as `vcflash convert` writes them."""
  if fields.get(_QUANTIZATION) and fields[_QUANTIZATION] != INT8_FIELD[_QUANTIZATION]:
    _refuse(path, fields, _QUANTIZATION, f"null, or {INT8_FIELD[_QUANTIZATION]}")


def has_int8(fields: Mapping[str, Any]) -> bool:
  """Whether the checked fields of a config.json say that the weights are int8."""
  return bool(fields.get(_QUANTIZATION))


def read_dropout(path: Path, fields: Mapping[str, Any], depth: int) -> DropoutConfig | None:
  """Reads video-level dropout; returns None if it is off, and then ignores its other fields.

  With `llm_compress_layer_list: [4, 18]`, upstream drops tokens after 4 layers. This package says:
  before layer 4, counted from 0. Both mean the same.

  Args:
    path: the file, for error messages.
    fields: fields of config.json.
    depth: number of decoder layers.
  """
  switch = fields.get("mm_llm_compress")
  if not switch:  # null, false and {} all mean "off"
    return None
  if switch is not True:
    _refuse(path, fields, "mm_llm_compress", "true or false")
  kind, layers, ratios = (
    fields.get(f"llm_{field}")
    for field in ("compress_type", "compress_layer_list", "image_token_ratio_list")
  )
  if kind not in DROPOUT_KINDS:
    _refuse(path, fields, "llm_compress_type", f"one of {', '.join(DROPOUT_KINDS)}")
  if not _rising_layers(layers, depth):
    _refuse(path, fields, "llm_compress_layer_list", f"rising layer numbers from 1 to {depth - 1}")
  if not _falling_ratios(ratios) or len(ratios) != len(layers) + 1:
    wanted = f"{len(layers) + 1} numbers above 0 that start with 1 and never rise"
    _refuse(path, fields, "llm_image_token_ratio_list", wanted)
  return DropoutConfig(kind, tuple(layers), tuple(map(float, ratios)))


def _rising_layers(layers, depth):
  if not isinstance(layers, list) or not layers or not all(type(n) is int for n in layers):
    return False
  return sorted(set(layers)) == layers and layers[0] >= 1 and layers[-1] < depth


def _falling_ratios(ratios):
  if not isinstance(ratios, list) or not all(type(ratio) in (int, float) for ratio in ratios):
    return False
  usable = ratios[:1] == [1] and all(0 < ratio <= 1 for ratio in ratios)
  return usable and sorted(ratios, reverse=True) == ratios


def read_rope(path: Path, fields: Mapping[str, Any]) -> tuple[str, Any, YarnConfig | None]:
  """Reads rotary positions from `rope_theta`, and from `rope_scaling` or `rope_parameters`.

  Files of transformers 5 say everything in `rope_parameters`; files of earlier versions have the
  two other fields. If YaRN is given without the original length, `max_position_embeddings` is used.

  Returns:
    The name of the field with theta, its value (None if it is missing), and YaRN, or None if it is
    off.
  """
  if not _is_near(fields.get("partial_rotary_factor") or 1, 1):
    _refuse(path, fields, "partial_rotary_factor", "1, or left out")
  given = {name: fields[name] for name in _ROPE_FIELDS if fields.get(name)}
  yarn = agreed(path, {name: _read_yarn(path, fields, name) for name in given}, given)
  thetas = {"rope_theta": fields.get("rope_theta")}
  thetas |= {f"{name}.rope_theta": value.get("rope_theta") for name, value in given.items()}
  theta = agreed(path, {name: value for name, value in thetas.items() if value is not None})
  name = next((name for name, value in thetas.items() if value is not None), "rope_theta")
  return name, theta, yarn


def _read_yarn(path: Path, fields: Mapping[str, Any], name: str) -> YarnConfig | None:
  """Reads YaRN from one field; returns None if the field describes unscaled positions."""
  wanted = "null, or yarn with a factor of 1 or more and original_max_position_embeddings"
  if not isinstance(fields[name], dict):
    _refuse(path, fields, name, wanted)
  scaling = {option: value for option, value in fields[name].items() if value is not None}
  scaling.pop("rope_theta", None)
  types = {f"{name}.{key}": scaling.pop(key) for key in ("type", "rope_type") if key in scaling}
  kind = agreed(path, types) if types else "default" if name == "rope_parameters" else None
  fixed = _FIXED_ROPE
  if kind == "yarn":
    factor = scaling.pop("factor", None)
    originals = {
      "original_max_position_embeddings": fields.get("original_max_position_embeddings"),
      f"{name}.original_max_position_embeddings": scaling.pop(
        "original_max_position_embeddings", None
      ),
    }
    original = agreed(path, {key: value for key, value in originals.items() if value is not None})
    if original is None:
      original = fields.get("max_position_embeddings")
    if not (type(factor) in (int, float) and 1 <= factor < 1e6):
      _refuse(path, fields, name, wanted)
    if type(original) is not int or original <= 0:
      _refuse(path, fields, name, wanted)
    fixed = fixed | _FIXED_YARN | {"attention_factor": 0.1 * math.log(factor) + 1}
  elif kind != "default":
    _refuse(path, fields, name, wanted)
  for option, value in scaling.items():
    if option not in fixed or not _is_near(value, fixed[option]):
      only = f"; {option} can only be {fixed[option]:g}" if option in fixed else f" and no {option}"
      _refuse(path, fields, name, wanted + only)
  return YarnConfig(float(factor), original) if kind == "yarn" else None


def _is_near(value, number):
  """Whether a value is about a number; a bool is only so if the number is one."""
  if type(value) is bool or type(number) is bool:
    return value is number
  return isinstance(value, int | float) and math.isclose(value, number, rel_tol=1e-6)


def read_tiling(path: Path, fields: Mapping[str, Any], image_size: int) -> TilingConfig:
  """Reads from `image_grid_pinpoints` into which grids of tiles an image may be cut.

  The field is a list of all sizes (width, height) in pixels, or a text. Both `"(1x1),...,(6x6)"`
  and, for tiles of 448 pixels, `[[448, 448], [448, 896], ..., [2688, 2688]]` allow all grids of up
  to 6 x 6 tiles.
  """
  grids = fields.get("image_grid_pinpoints")
  if grids is None:
    return TilingConfig()
  tiling = None
  if isinstance(grids, str):
    found = re.fullmatch(r"\(1x1\),\.\.\.,\(([1-9]\d?)x([1-9]\d?)\)", grids.replace(" ", ""))
    if found:
      tiling = TilingConfig(*map(int, found.groups()))
  elif isinstance(grids, list) and grids and isinstance(grids[-1], list) and len(grids[-1]) == 2:
    columns, rows = (size // image_size if type(size) is int else 0 for size in grids[-1])
    is_complete = columns * rows == len(grids)  # otherwise the list below could be very long
    if is_complete and grids == grid_sizes(TilingConfig(columns, rows), image_size):
      tiling = TilingConfig(columns, rows)
  if tiling is None:
    shown = str(grids) if len(str(grids)) < 80 else f"{str(grids)[:60]}..."
    _refuse(
      path,
      {"image_grid_pinpoints": shown},
      "image_grid_pinpoints",
      f"all grids of {image_size}-pixel tiles in order, or a text such as (1x1),...,(6x6)",
    )
  return tiling


def grid_sizes(tiling: TilingConfig, image_size: int) -> list[list[int]]:
  """Returns (width, height) in pixels of every grid. Of equally good grids the first is used."""
  return [
    [columns * image_size, rows * image_size]
    for columns in range(1, tiling.max_columns + 1)
    for rows in range(1, tiling.max_rows + 1)
  ]


def rope_fields(theta: float, yarn: YarnConfig | None) -> dict[str, Any]:
  """Returns upstream's fields for rotary positions, in the form that all versions can read."""
  scaling = yarn and {
    "type": "yarn",
    "factor": yarn.factor,
    "original_max_position_embeddings": yarn.original_positions,
  }
  return {"rope_theta": theta, "rope_scaling": scaling}


def option_fields(
  dropout: DropoutConfig | None, tiling: TilingConfig, image_size: int
) -> dict[str, Any]:
  """Returns upstream's fields for dropout and tiling.

  If dropout is off, only the field that switches it off is returned, without the others.
  """
  fields: dict[str, Any] = {
    "mm_llm_compress": dropout is not None,
    "image_grid_pinpoints": grid_sizes(tiling, image_size),
  }
  if dropout is not None:
    fields["llm_compress_type"] = dropout.kind
    fields["llm_compress_layer_list"] = list(dropout.layers)
    fields["llm_image_token_ratio_list"] = list(dropout.ratios)
  return fields


def _refuse(path: Path, fields: Mapping[str, Any], field: str, wanted: str) -> NoReturn:
  raise InputError(f"{path}: field '{field}' is {fields.get(field)!r:.80}; it has to be {wanted}")
