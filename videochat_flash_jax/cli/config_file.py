"""Config files, which are Python and return a ConfigDict; and --config.FIELD=VALUE."""

import argparse
import ast
import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from videochat_flash_jax.errors import InputError

_TINY = "configs/tiny.py"


def add_config_argument(parser: argparse.ArgumentParser):
  """Adds the option `--config` to a verb that has TAKES_OVERRIDES."""
  parser.add_argument(
    "--config",
    type=Path,
    required=True,
    help="Python file with get_config(); --config.FIELD=VALUE changes a field",
  )


def read_config(path: Path, overrides: Sequence[str], example: str = _TINY) -> ConfigDict:
  """Returns the config of a file, with fields changed.

  Args:
    path: the config file.
    overrides: changes of fields; see `apply_override`.
    example: a config file that the verb takes; error messages recommend it.

  Raises:
    InputError: see `load_config` and `apply_override`.
  """
  config = load_config(path, example)
  for override in overrides:
    apply_override(config, override)
  return config


def load_config(path: Path, example: str = _TINY) -> ConfigDict:
  """Returns the result of `get_config()` in a config file; see `read_config` for `example`.

  Raises:
    InputError: the file is missing, raises an error, or returns no ConfigDict.
  """
  if not path.is_file():
    raise InputError(f"--config {path}: no such file; give one such as {example}")
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None:
    raise InputError(f"--config {path}: no Python file; give one such as {example}")
  module = importlib.util.module_from_spec(spec)
  modules = set(sys.modules)
  sys.path.insert(
    0, str(path.parent.resolve())
  )  # as for a script, so that it can import files beside it
  try:
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
  except Exception as error:  # the user's code may raise anything
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise InputError(f"--config {path}: fails ({reason}); correct the file") from error
  finally:
    sys.path.pop(0)
    for name in set(sys.modules) - modules:
      if _is_beside(path, sys.modules[name]):  # another folder may have a `common.py` of its own
        del sys.modules[name]
  if not isinstance(config, ConfigDict):
    raise InputError(
      f"--config {path}: no get_config() that returns a ConfigDict; see {example} for one"
    )
  return config


def _is_beside(path, module):
  file = getattr(module, "__file__", None)
  return file is not None and Path(file).parent == path.parent.resolve()


def apply_override(config: ConfigDict, override: str):
  """Sets one field, written `--config.FIELD=VALUE`, to a value of its type.

  Raises:
    InputError: it is written otherwise, the config has no such field (the nearest ones are
      named), or the value has another type.
  """
  left, equals, text = override.partition("=")
  if not left.startswith("--config.") or not equals:
    raise InputError(f"unknown argument {override!r:.80}: write --config.FIELD=VALUE")
  name = left.removeprefix("--config.")
  fields = list(_field_names(config))
  if name not in fields:
    _refuse_sections(config, name)
    near = difflib.get_close_matches(name, fields, n=2, cutoff=0.0)
    raise InputError(f"the config has no field {name!r:.80}: did you mean {' or '.join(near)}?")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  kind = _kind(config, name)
  if kind is str and value is not None and not isinstance(value, str):
    value = text  # such as a directory that is called 2024
  try:
    if isinstance(value, bool) and kind in (int, float):  # which ml_collections takes for 1 or 0
      raise TypeError
    config.update_from_flattened_dict({name: value})
  except (TypeError, OverflowError):
    message = f"--config.{name}={text}: the field is of type {kind.__name__}; give one"
    raise InputError(message) from None


def _refuse_sections(config, name):
  """Raises an error for a section such as data.synthetic, and for a field of an empty section."""
  sections, parent = dict(_sections(config)), name.rpartition(".")[0]
  empty = parent if parent in sections and not sections[parent] else None
  if section := name if name in sections else empty:
    raise InputError(
      f"config.{section} takes fields by name: set it in a copy of the config file, beside "
      "common.py"
    )


def _sections(config, prefix=""):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield f"{prefix}{name}", value
      yield from _sections(value, f"{prefix}{name}.")


def _field_names(config, prefix=""):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _field_names(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"


def _kind(config, name):
  """The type of a field's values, also if it has none yet."""
  *sections, field = name.split(".")
  for section in sections:
    config = config[section]
  return config.get_type(field)
