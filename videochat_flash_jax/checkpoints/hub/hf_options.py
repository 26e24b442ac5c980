"""Translates the optional parts of `config.json`: video-level dropout, YaRN and image tiling.

Every function takes the fields of the file, and its path for error messages. An `InputError` names
the field, its value, and the values that are allowed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import (
  DROPOUT_KINDS,
  DropoutConfig,
  TilingConfig,
  YarnConfig,
)

_YARN_FIELDS = {"type", "rope_type", "factor", "original_max_position_embeddings"}


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
  return sorted(ratios, reverse=True) == ratios and ratios[:1] == [1] and ratios[-1] > 0


def read_yarn(path: Path, fields: Mapping[str, Any]) -> YarnConfig | None:
  """Reads YaRN from `rope_scaling`; returns None if it is off.

  If the field does not give the original length, `max_position_embeddings` is used.
  """
  scaling = fields.get("rope_scaling")
  if not scaling:
    return None
  wanted = "null, or yarn with a factor of 1 or more and original_max_position_embeddings"
  if not isinstance(scaling, dict):
    _refuse(path, fields, "rope_scaling", wanted)
  kind = scaling.get("rope_type", scaling.get("type"))
  if kind == "default":
    return None
  factor = scaling.get("factor")
  original = scaling.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
  usable = type(factor) in (int, float) and 1 <= factor < 1e6 and type(original) is int
  if kind != "yarn" or set(scaling) - _YARN_FIELDS or not usable or original <= 0:
    _refuse(path, fields, "rope_scaling", wanted)
  return YarnConfig(float(factor), original)


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


def option_fields(
  dropout: DropoutConfig | None, yarn: YarnConfig | None, tiling: TilingConfig, image_size: int
) -> dict[str, Any]:
  """Returns upstream's fields for dropout, YaRN and tiling.

  If dropout is off, only the field that switches it off is returned, without the others.
  """
  fields: dict[str, Any] = {
    "mm_llm_compress": dropout is not None,
    "rope_scaling": None,
    "image_grid_pinpoints": grid_sizes(tiling, image_size),
  }
  if dropout is not None:
    fields["llm_compress_type"] = dropout.kind
    fields["llm_compress_layer_list"] = list(dropout.layers)
    fields["llm_image_token_ratio_list"] = list(dropout.ratios)
  if yarn is not None:
    fields["rope_scaling"] = {
      "type": "yarn",
      "factor": yarn.factor,
      "original_max_position_embeddings": yarn.original_positions,
    }
  return fields


def _refuse(path: Path, fields: Mapping[str, Any], field: str, wanted: str) -> NoReturn:
  raise InputError(f"{path}: field '{field}' is {fields.get(field)!r}; it has to be {wanted}")
