"""What config fields must be, and what to say when they are not."""

import math
from typing import Any

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
