"""Checks values of a JSON file: their types, and that none of them contradicts another."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videochat_flash_jax.errors import InputError

_LARGEST = sys.float_info.max
# Type of a field -> what its value has to be. Here a bool does not count as a number.
_VALUES = {
  int: ("a positive whole number", lambda value: type(value) is int and value > 0),
  float: ("a positive number", lambda value: type(value) in (int, float) and 0 < value <= _LARGEST),
  bool: ("true or false", lambda value: type(value) is bool),
  str: ("a text", lambda value: type(value) is str),
}


def checked(
  path: Path, part: type, values: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the values, converted to the types of a dataclass.

  For example, 1000000 becomes 1000000.0 for a float.

  Args:
    path: the file, for error messages.
    part: the dataclass. Its fields that are not in `values` are ignored.
    values: the values by field name.
    names: for each field name, the name of that field in the file.

  Raises:
    InputError: a value has another type, or a number is not positive and finite.
  """
  typed = dict(values)
  for field in dataclasses.fields(part):
    if field.name not in values:
      continue
    wanted, fits = _VALUES[field.type]
    if not fits(values[field.name]):
      found = f"field '{names[field.name]}' is {values[field.name]!r:.80}"
      raise InputError(f"{path}: {found}; it has to be {wanted}")
    typed[field.name] = field.type(values[field.name])
  return typed


def agreed(path: Path, values: Mapping[str, Any], written: Mapping[str, Any] | None = None) -> Any:
  """Returns the value that several fields have in common; None if there are no fields.

  Args:
    path: the file, for error messages.
    values: values that mean the same, by the names of their fields.
    written: the fields as they are in the file, where `values` were made from them.

  Raises:
    InputError: two of them differ.
  """
  if not values:
    return None
  first, shown = next(iter(values)), written or values
  for name, value in values.items():
    if value != values[first]:
      raise InputError(
        f"{path}: field '{name}' ({shown[name]!r:.80}) contradicts '{first}' "
        f"({shown[first]!r:.80}); correct one of them, or remove it"
      )
  return values[first]


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Makes a JSON object of its pairs: the `object_pairs_hook` of `json.loads`.

  Raises:
    ValueError: a key stands there twice.
  """
  fields = dict(pairs)
  if len(fields) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"field {twice!r:.80} stands there twice")
  return fields
