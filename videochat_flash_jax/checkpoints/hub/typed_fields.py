"""Checks values of a JSON file against the types that a dataclass declares."""

import dataclasses
import sys
from collections.abc import Mapping
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
      found = f"field '{names[field.name]}' is {values[field.name]!r}"
      raise InputError(f"{path}: {found}; it has to be {wanted}")
    typed[field.name] = field.type(values[field.name])
  return typed
