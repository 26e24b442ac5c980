"""From a config file to checked settings; all follows from the fields in `train/settings.py`.

default_config()          the ml_collections config with every field, which configs/common.py gives
train_settings(config)    the same config checked, as frozen dataclasses
config_table()            every field with its meaning, for `vcflash train --help-config`
config_changes(old, new)  what a run that goes on would change, and whether it may
"""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from videochat_flash_jax.data.batches.data_config import DataConfig, ExampleConfig, ReadingConfig
from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import OnResume
from videochat_flash_jax.train.settings import TrainSettings

_HELP = "`vcflash train --help-config` lists all fields"
_WIDTH = 100  # of the table, in characters


def require(usable: bool, name: str, value: Any, remedy: str):
  """Refuses a field of a config.

  Raises:
    InputError: `usable` is false; names the field, its value, and what to give.
  """
  if not usable:
    state = "is missing" if value is None else f"is {' '.join(repr(value).split())}"
    raise InputError(f"config.{name} {state}: give {remedy}")


class _Config(ConfigDict):
  """A ConfigDict that takes no bool for a number: the library would make 1.0 of True."""

  def __setitem__(self, key: str, value: Any):
    if isinstance(value, bool) and key in self and self.get_type(key) is float:
      require(False, key, value, "a number")
    if type(value) is ConfigDict:  # a section of the user's
      value = _Config(value)
    super().__setitem__(key, value)


def default_config() -> ConfigDict:
  """The config of a run with every field at its default, locked: a mistyped field is an error."""
  return _config_of(TrainSettings()).lock()


def _config_of(section: Any) -> ConfigDict:
  """A section's values as a ConfigDict."""
  config = _Config()
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if _is_section(field):
      value = _config_of(value)
    elif isinstance(value, dict):
      value = _Config(value)
    config[field.name] = placeholder(str) if value is None else value
  return config


def _is_section(field: dataclasses.Field) -> bool:
  return "rule" not in field.metadata


def run_configs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of each stage by its name; of a config without `stages` itself, by "".

  Raises:
    InputError: there are no stages in `stages`.
  """
  if "stages" not in config:
    return {"": config}
  require(bool(config.stages), "stages", config.stages, "a ConfigDict of configs of runs")
  return {name: stage.copy_and_resolve_references() for name, stage in config.stages.items()}


def train_settings(config: ConfigDict) -> TrainSettings:
  """Checks a config such as configs/stage3_long.py, field by field.

  What only a run needs, `init_from` and `data.mixture`, may be missing.

  Raises:
    InputError: names the first field that is missing, unknown or cannot be used, and what to give.
  """
  settings = _read_section(TrainSettings, config, "")
  patch, size = settings.model.vision.patch_size, settings.image_size
  remedy = f"pixels, a multiple of {patch} for {config.model}"
  require(size % patch == 0, "image_size", size, remedy)
  even = settings.rows % settings.accumulate == 0
  remedy = f"a divisor of rows, which is {settings.rows}"
  require(even, "accumulate", settings.accumulate, remedy)
  if settings.dropout is not None:
    settings.dropout.check(settings.model.decoder.depth)
  vision = dataclasses.replace(settings.model.vision, image_size=size)
  return dataclasses.replace(settings, model=dataclasses.replace(settings.model, vision=vision))


def data_config(settings: TrainSettings, num_shards: int, streams: int) -> DataConfig:
  """What batches of a run are made of.

  Args:
    settings: of the run.
    num_shards: devices among which the tokens of a row are split (`Layout.sequence_shards`).
    streams: independent packers, of all processes together.
  """
  data, model = settings.data, settings.model
  reading = {field.name: getattr(data, field.name) for field in dataclasses.fields(ReadingConfig)}
  return DataConfig(
    example=ExampleConfig(image_size=model.vision.image_size, tiling=model.tiling, **reading),
    row_shape=RowShape(
      tokens=settings.tokens_per_row,
      clip_tokens=model.clip_tokens,
      tile_tokens=model.tile_tokens,
      clips_per_shard=settings.clips_per_shard,
      tiles_per_shard=settings.tiles_per_shard,
      num_shards=num_shards,
      zigzag=settings.zigzag and num_shards > 1,
    ),
    rows=settings.rows,
    seed=settings.seed,
    streams=streams,
    workers=data.workers,
    max_broken_share=data.max_broken_share,
  )


def _read_section(kind: type, config: ConfigDict, prefix: str) -> Any:
  """An object of the dataclass `kind` from a section of a config; `prefix` is such as "data."."""
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name in config:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1) or fields
      raise InputError(f"config.{prefix}{name} is no field: did you mean {' or '.join(near)}?")
  values = {}
  for name, field in fields.items():
    path = f"{prefix}{name}"
    if name not in config:
      raise InputError(f"config.{path} is missing: give it; {_HELP}")
    value = config[name]
    if _is_section(field):
      names = ", ".join(inner.name for inner in dataclasses.fields(field.default))
      require(isinstance(value, ConfigDict), path, value, f"a ConfigDict of {names}")
      value = _read_section(type(field.default), value, f"{path}.")
    else:
      value = value.to_dict() if isinstance(value, ConfigDict) else value
      rule = field.metadata["rule"]
      require(rule.accepts(value), path, value, rule.remedy)
    convert = field.metadata["convert"]
    values[name] = value if convert is None else convert(value)
  return kind(**values)


class ConfigField(NamedTuple):
  """A field of a run's config.

  Attributes:
    path: such as "data.frames".
    default: its default value.
    accepts: what it takes, in words.
    on_resume: whether it may change when a run goes on.
    meaning: for users.
  """

  path: str
  default: Any
  accepts: str
  on_resume: OnResume
  meaning: str


def config_fields() -> list[ConfigField]:
  """All fields of a run's config, in their order."""
  return list(_fields_of(TrainSettings(), "", None))


def _fields_of(section: Any, prefix: str, on_resume: OnResume | None) -> Iterator[ConfigField]:
  for field in dataclasses.fields(section):
    path, default = f"{prefix}{field.name}", getattr(section, field.name)
    what, rule = field.metadata, field.metadata.get("rule")
    if rule is None:
      yield from _fields_of(default, f"{path}.", on_resume or what["on_resume"])
    else:
      yield ConfigField(path, default, rule.remedy, on_resume or what["on_resume"], what["meaning"])


def config_table() -> str:
  """A table of all fields of a run's config: default, what a resumed run may change, meaning."""
  rows = [(f.path, repr(f.default), f.on_resume, f.meaning, f.accepts) for f in config_fields()]
  first, third = max(len(row[0]) for row in rows), max(len(row[2]) for row in rows)
  lines = [
    "Fields of a run's config. Set one in a config file, or by --config.FIELD=VALUE.",
    "",
    f"{'field':{first}}  {'on resume':{third}}  meaning, what to give, and the default",
  ]
  indent = " " * (first + third + 4)
  for path, default, on_resume, meaning, accepts in rows:
    text = textwrap.wrap(
      f"{meaning} Give {accepts}. Default: {default}.",
      _WIDTH - len(indent),
      break_long_words=False,
      break_on_hyphens=False,
    )
    lines.append(f"{path:{first}}  {on_resume:{third}}  {text[0]}")
    lines += [indent + line for line in text[1:]]
  return "\n".join(lines)


class Change(NamedTuple):
  """A field that has another value than before.

  Attributes:
    path: such as "data.frames", or "data.synthetic.absence" for a part of a field.
    before: its value before, as JSON has it.
    now: its value now, as JSON has it.
    on_resume: what the change means for a run that goes on.
  """

  path: str
  before: Any
  now: Any
  on_resume: OnResume


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
  """Fields that differ between two configs of a run.

  A field that one of them lacks, since another version of this package wrote it, has its default.

  Args:
    before: a config, as JSON has it.
    now: another one.
  """
  defaults = _flat(json.loads(default_config().to_json_best_effort()))
  old, new = (defaults | _flat(config) for config in (before, now))
  return [
    Change(path, old.get(path), new.get(path), _on_resume(path))
    for path in {**new, **old}
    if json.dumps(old.get(path)) != json.dumps(new.get(path))
  ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values of a nested mapping by their dotted paths."""
  flat = {}
  for name, value in config.items():
    nested = isinstance(value, Mapping)
    flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
  return flat


def _on_resume(path: str) -> OnResume:
  """What a change of a field, or of a part of one, means; an unknown field must not change."""
  rules = (f.on_resume for f in config_fields() if f"{path}.".startswith(f"{f.path}."))
  return next(rules, OnResume.FIXED)
