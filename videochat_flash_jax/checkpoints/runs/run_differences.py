"""Whether a checkpoint is one of this run: what differs in its config, or among its arrays."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from videochat_flash_jax.errors import InputError

# Fields of a config without which what is saved means something else; more than their shapes tell.
_BINDING = ("objective", "model", "lora", "optimizer.name", "optimizer.scales")


def config_differences(field: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
  """Fields of two configs that differ as JSON has them, each with both values.

  Args:
    field: the path of what is compared, "" for whole configs.
    before: a value or a dict of them.
    now: the same of another config.
  """
  if isinstance(before, dict) and isinstance(now, dict):
    for name in now | before:
      path = f"{field}.{name}" if field else name
      yield from config_differences(path, before.get(name), now.get(name))
  elif json.dumps(before) != json.dumps(now):
    yield field, before, now


def check_config(where: Path, saved: Mapping[str, Any], now: Mapping[str, Any]):
  """Refuses a checkpoint whose config gives its arrays another meaning.

  Args:
    where: the checkpoint, for messages.
    saved: its config.
    now: that of this run.

  Raises:
    InputError: names the first field that differs.
  """
  for name in _BINDING:
    before, after = (_field(config, name) for config in (saved, now))
    for path, old, new in config_differences(f"config.{name}", before, after):
      raise InputError(
        f"{where}: this checkpoint was trained with {path} {old!r}, now it is {new!r}; "
        f"give {old!r}, or another --workdir"
      )


def _field(config, name):
  for part in name.split("."):
    config = (config or {}).get(part)
  return config


def check_arrays(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]):
  """Refuses a checkpoint that holds other arrays than are asked for, or of other shapes.

  Args:
    where: the checkpoint, for messages.
    saved: what it holds, by dotted paths; anything with a `shape`.
    wanted: the same of this run.

  Raises:
    InputError: names the first array that differs.
  """
  for path in {**wanted, **saved}:
    held, asked = (
      f"{list(arrays[path].shape)}" if path in arrays else "none" for arrays in (saved, wanted)
    )
    if held != asked:
      raise InputError(
        f"{where}: a checkpoint of another config: of {path} it holds {held}, and this config "
        f"asks for {asked}; give the config that it was trained with, or another --workdir"
      )
