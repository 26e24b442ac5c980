"""Fields of a config: what each one takes, its default and its meaning, written down once.

The same rules check the arguments of public functions, see `argument`.

A section of a config is a frozen dataclass whose fields are made by `field`:

  @dataclasses.dataclass(frozen=True)
  class CheckpointSettings:
    every: int = field(500, count(), "Steps between two checkpoints.")
    keep: int = field(3, count(), "How many of the newest checkpoints are kept.")

`train/config.py` makes the ml_collections config, its checks, its table of help and the rules for a
resumed run from such classes.
"""

import dataclasses
import enum
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from videochat_flash_jax.errors import InputError

REQUIRED = dataclasses.MISSING  # the default of a field that has none


class Rule(NamedTuple):
  """Which values a field takes.

  Attributes:
    accepts: tells whether a value can be used.
    remedy: says what to give instead, as in "a positive integer".
  """

  accepts: Callable[[Any], bool]
  remedy: str


class OnResume(enum.StrEnum):
  """What may happen to a field when a run goes on from its checkpoint."""

  MAY_CHANGE = "may change"  # results stay the same but for rounding, or the user means the change
  FIXED = "fixed"  # with another value it would be another run
  FIXED_BY_WEIGHTS = "fixed by the weights"  # without this value the saved arrays mean nothing


def field(
  default: Any,
  rule: Rule,
  meaning: str,
  *,
  on_resume: OnResume = OnResume.FIXED,
  convert: Callable[[Any], Any] | None = None,
) -> Any:
  """A field of a dataclass that is a section of a config.

  Args:
    default: its value in a config that does not set it; or REQUIRED.
    rule: which values it takes.
    meaning: a short text for users.
    on_resume: whether a run that goes on may have another value.
    convert: makes the value of the dataclass from the value in the config.
  """
  metadata = {"rule": rule, "meaning": meaning, "on_resume": on_resume, "convert": convert}
  if isinstance(default, dict):  # each object gets one of its own
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def section(
  default: Any,
  meaning: str,
  *,
  on_resume: OnResume | None = None,
  convert: Callable[[Any], Any] | None = None,
) -> Any:
  """A field that has fields of its own.

  Args:
    default: an object of the section's dataclass; its values are the defaults of the fields.
    meaning: a short text for users.
    on_resume: the same for all of its fields; by default each field's own counts.
    convert: makes the value of the outer dataclass from the section's object.
  """
  metadata = {"meaning": meaning, "on_resume": on_resume, "convert": convert}
  return dataclasses.field(default=default, metadata=metadata)


def is_integer(value: Any) -> bool:
  """Whether a value is an integer; True and False are not."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
  """Whether a value is a finite number; True and False are not."""
  return (is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def argument(name: str, value: Any, rule: Rule) -> Any:
  """Returns an argument of a function if a rule takes it.

  A scalar of NumPy or JAX counts as the number that it holds, which is returned.

  Raises:
    InputError: the rule does not take it. The message names the argument.
  """
  if getattr(value, "shape", None) == ():
    value = value.item()
  if not rule.accepts(value):
    raise InputError(f"{name} is {value!r:.80}: give {rule.remedy}")
  return value


def count(least: int = 1) -> Rule:
  """Takes integers of `least` or more."""
  remedy = "a positive integer" if least == 1 else f"an integer of {least} or more"
  return Rule(lambda value: is_integer(value) and value >= least, remedy)


def number(*, above: float | None = None, most: float = math.inf) -> Rule:
  """Takes finite numbers from 0, or greater than `above`, and up to `most`."""
  remedy = f"a number {'from 0' if above is None else f'above {above:g}'}"
  if most < math.inf:
    remedy += f" to {most:g}"

  def accepts(value):
    """Checks the type first, then the bounds."""
    return is_number(value) and (value >= 0 if above is None else value > above) and value <= most

  return Rule(accepts, remedy)


SEED = Rule(lambda n: is_integer(n) and 0 <= n < 2**32, "an integer below 2**32, from 0")


def choice(*words: str) -> Rule:
  """Takes one of some words; "" may be one of them."""
  return Rule(
    lambda value: isinstance(value, str) and value in words,
    " or ".join(word or "''" for word in words),
  )


def flag() -> Rule:
  """Takes True and False."""
  return Rule(lambda value: isinstance(value, bool), "True or False")


def text() -> Rule:
  """Takes strings."""
  return Rule(lambda value: isinstance(value, str), "a string")


def optional(rule: Rule) -> Rule:
  """Takes what `rule` takes, and None, which means that nothing is given."""
  return Rule(lambda value: value is None or rule.accepts(value), rule.remedy)


def pattern() -> Rule:
  """Takes regular expressions."""
  return Rule(is_pattern, "a regular expression")


def is_pattern(value: Any) -> bool:
  """Whether a value is a regular expression, as a string."""
  try:
    return isinstance(value, str) and re.compile(value) is not None
  except re.error:
    return False


def sequence(
  is_element: Callable[[Any], bool] = lambda value: True, remedy: str = "a tuple"
) -> Rule:
  """Takes tuples and lists of certain elements."""
  return Rule(lambda value: is_sequence(value) and all(map(is_element, value)), remedy)


def is_sequence(value: Any) -> bool:
  """Whether a value is a tuple or a list."""
  return isinstance(value, tuple | list)


def is_pair(value: Any) -> bool:
  """Whether a value is a tuple or a list of two elements."""
  return is_sequence(value) and len(value) == 2


def weights(*names: str) -> Rule:
  """Takes mappings from some of the names to numbers from 0 that are not all 0, or an empty one."""

  def accepts(value):
    """Checks the names, then the numbers."""
    if not isinstance(value, Mapping) or not set(value) <= set(names):
      return False
    numbers = list(value.values())
    usable = all(is_number(number) and number >= 0 for number in numbers)
    return usable and (not numbers or sum(numbers) > 0)

  remedy = f"weights from 0 for {' and '.join(names)}, not all 0; or an empty ConfigDict"
  return Rule(accepts, remedy)
