"""Mixtures: which annotation files a training run reads, and how much of each.

They are written in the format of the official training code, and its published mixtures work
unchanged:

  datasets:
    - json_path: longvid.jsonl          # .json or .jsonl; docs/data_format.md describes the rows
      data_root: videos                 # folder that the rows' paths are relative to
      sampling_strategy: first:25%      # all, first, first2..4, end, random; see annotations.py
      media_type: video                 # by default what the file's first row has
      video_read_type: img              # folders of pictures
      weight: 2.0                       # only here: how often its rows are seen in an epoch
      seed: 1                           # only here: of sampling strategy `random`

A relative path is relative to the mixture's folder (in the official code, to the working
directory). Every path may be an address such as `gs://bucket/longvid.jsonl`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from videochat_flash_jax.data.media.files import check_regular, is_address, open_media
from videochat_flash_jax.data.mixture.annotations import nearest, strategy_parts
from videochat_flash_jax.data.mixture.yaml_text import parse_yaml
from videochat_flash_jax.errors import InputError

ANNOTATION_SUFFIXES = (".json", ".jsonl")
_MEDIA_TYPES = ("image", "video", "text", "mix")
# The first four name decoders of the original; here all of them are read in the same way. The last
# two stand for folders of pictures.
VIDEO_READ_TYPES = ("decord", "av", "gif", "lazy", "img", "frame")
_MAX_WEIGHT = 1_000_000  # so that the rows of an epoch can be counted
_WORDS = {"media_type": _MEDIA_TYPES, "video_read_type": VIDEO_READ_TYPES}


@dataclasses.dataclass(frozen=True)
class Source:
  """One annotation file of a mixture, and how it is used; its paths are full paths.

  If there is no `data_root`, the paths in the rows are relative to `folder`, and may lead out of
  it.
  """

  json_path: str
  sampling_strategy: str = "all"
  data_root: str = ""
  media_type: str | None = None
  video_read_type: str | None = None
  weight: float = 1.0
  seed: int = 0
  folder: str = ""


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Annotation files, read in this order; `path` is for messages."""

  path: str
  sources: tuple[Source, ...]


def read_mixture(path: str | os.PathLike) -> Mixture:
  """Reads a mixture (.yaml); a single annotation file (.json, .jsonl) becomes a mixture, too.

  Raises:
    InputError: the file cannot be read, or an entry has an unknown field or a value that cannot be
      used. The message names file, entry and field, and the most similar correct word.
  """
  path = str(path) if is_address(path) else os.path.abspath(path)
  suffix = Path(path).suffix.lower()
  if suffix in ANNOTATION_SUFFIXES:
    return Mixture(path, (Source(path, folder=os.path.dirname(path)),))
  if suffix not in (".yaml", ".yml"):
    raise InputError(
      f"{path}: not a mixture; give a .yaml file, or an annotation file (.json, .jsonl)"
    )
  content = _read_yaml(path)
  entries = content.get("datasets") if isinstance(content, dict) else None
  if not isinstance(entries, list) or not entries:
    raise InputError(f"{path}: field 'datasets' is missing or empty; give a list of entries")
  for field in content:
    if field != "datasets":
      raise InputError(f"{path}: unknown field {field!r:.80}; the only one is 'datasets'")
  return Mixture(
    path, tuple(_source(f"{path}: datasets[{i}]", path, entry) for i, entry in enumerate(entries))
  )


def _read_yaml(path):
  check_regular(path)
  try:
    opened = open_media(path)
    with open(opened, "rb") if isinstance(opened, str) else opened as file:
      text = file.read()
  except OSError as error:
    problem = error.strerror or error
    raise InputError(f"{path}: cannot be read ({problem}); check the path") from error
  try:
    return parse_yaml(text)
  except ValueError as error:
    raise InputError(f"{path}: not valid YAML ({error}); correct it") from error


def _source(where, mixture_path, entry) -> Source:
  if not isinstance(entry, Mapping):
    raise InputError(f"{where} is {entry!r:.100}; give fields such as 'json_path: a.jsonl'")
  fields = [field.name for field in dataclasses.fields(Source) if field.name != "folder"]
  for field in entry:
    if field not in fields:
      raise InputError(f"{where}: unknown field {field!r:.80}; {nearest(str(field), fields)}")
  folder = os.path.dirname(mixture_path)
  values = {field: value for field, value in entry.items() if value is not None}
  for field, value in values.items():
    _check_value(f"{where}: field {field!r:.80}", field, value)
  if not values.get("json_path"):
    raise InputError(f"{where}: field 'json_path' is missing; name a .json or .jsonl file")
  for field in ("json_path", "data_root"):
    if values.get(field) and not is_address(values[field]):
      values[field] = os.path.normpath(os.path.join(folder, values[field]))
  return Source(**values, folder=folder)


def _check_value(where, field, value):
  """Raises an `InputError` for a value that a field cannot have."""
  if field == "weight":
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _MAX_WEIGHT:
      found = f"{where} is {value!r:.100}"
      raise InputError(f"{found}; give a number above 0, {_MAX_WEIGHT:,} at most")
  elif field == "seed":
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise InputError(f"{where} is {value!r:.80}; give a whole number, 0 or more")
  elif not isinstance(value, str):
    raise InputError(f"{where} is {value!r:.100}; give a text")
  elif field in _WORDS and value not in _WORDS[field]:
    raise InputError(f"{where} is {value!r:.80}; {nearest(value, _WORDS[field])}")
  elif field == "json_path" and Path(value).suffix.lower() not in ANNOTATION_SUFFIXES:
    raise InputError(f"{where} is {value!r:.80}; name a .json or .jsonl file")
  elif field == "sampling_strategy":
    try:
      strategy_parts(value)
    except InputError as error:
      raise InputError(f"{where}: {error}") from error
