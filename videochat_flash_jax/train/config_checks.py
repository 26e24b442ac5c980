"""What config fields must be, and what to say when they are not."""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from videochat_flash_jax.errors import InputError


def require(usable: bool, name: str, value: Any, remedy: str):
  """Refuses a field of a config.

  Raises:
    InputError: `usable` is false; names the field, its value, and what to give.
  """
  if not usable:
    state = "is missing" if value is None else f"is {' '.join(repr(value).split())}"
    raise InputError(f"config.{name} {state}: give {remedy}")


def is_count(value: Any, least: int = 1) -> bool:
  """Whether it is an integer of `least` or more."""
  return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
  """Whether it is a finite number."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def are_names(value: Any) -> bool:
  """Whether it is a sequence of strings with at least one of them."""
  some = isinstance(value, tuple | list) and len(value) > 0
  return some and all(isinstance(name, str) for name in value)


class Section:
  """Reads the fields of a config, or of a part of it, and refuses what cannot be used.

  optimizer = Section(config, "optimizer", ("name", "learning_rate"))
  optimizer.number("learning_rate", above=0)     # InputError: config.optimizer.learning_rate is ...
  """

  def __init__(self, config: ConfigDict, name: str, fields: Sequence[str]):
    """Checks the names of the fields alone.

    Args:
      config: the whole config.
      name: of the part; "" is all of it.
      fields: all that it has.

    Raises:
      InputError: the part is missing, a field of it is, or it has another; names the nearest.
    """
    self._config, self._prefix = config, f"{name}." if name else ""
    if name:
      self._config = config.get(name)
      is_section = isinstance(self._config, ConfigDict)
      require(is_section, name, self._config, f"a ConfigDict of {', '.join(fields)}")
    for field in self._config:
      if field not in fields:
        near = difflib.get_close_matches(field, fields, n=1) or fields
        raise InputError(
          f"config.{self._prefix}{field} is no field: did you mean {' or '.join(near)}?"
        )
    for field in fields:
      if field not in self._config:
        raise InputError(f"config.{self._prefix}{field} is missing: see configs/common.py")

  def value(self, field: str, is_usable: Callable[[Any], bool], remedy: str) -> Any:
    """A field of which `is_usable` holds; else an InputError says what to give."""
    value = self._config[field]
    require(is_usable(value), f"{self._prefix}{field}", value, remedy)
    return value

  def count(self, field: str, least: int = 1) -> int:
    """An integer of `least` or more."""
    remedy = "a positive integer" if least == 1 else f"an integer of {least} or more"
    return self.value(field, lambda value: is_count(value, least), remedy)

  def number(self, field: str, *, above: float | None = None, most: float = math.inf) -> float:
    """A number from 0, or above `above`, to `most`."""
    least = "from 0" if above is None else "above 0" if above == 0 else f"above {above}"
    remedy = f"a number {least}" + ("" if most == math.inf else f" to {most:g}")

    def is_usable(value):
      return is_number(value) and value <= most and (value >= 0 if above is None else value > above)

    return float(self.value(field, is_usable, remedy))

  def choice(self, field: str, choices: Sequence[str]) -> str:
    """One of some words."""
    remedy = " or ".join(word or "''" for word in choices)
    return self.value(field, lambda value: isinstance(value, str) and value in choices, remedy)

  def flag(self, field: str) -> bool:
    """True or False."""
    return self.value(field, lambda value: isinstance(value, bool), "True or False")

  def text(self, field: str, *, may_be_missing: bool = False) -> str | None:
    """A string; a placeholder that nobody filled is None."""

    def is_usable(value):
      return isinstance(value, str) or (value is None and may_be_missing)

    return self.value(field, is_usable, "a string")
