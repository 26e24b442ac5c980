"""Rules of config fields: what each takes, and what it recommends."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import (
  SEED,
  argument,
  choice,
  count,
  flag,
  is_integer,
  number,
  optional,
  pattern,
  sequence,
  text,
  weights,
)


@pytest.mark.parametrize(
  "rule, taken, refused",
  [
    (count(), [1, 7], [0, -1, 1.0, True, "1", None]),
    (count(0), [0, 1], [-1, False]),
    (number(), [0, 0.5, 3], [-0.1, math.nan, math.inf, 10**400, True, "1", None]),
    (number(above=0), [1e-9], [0, -1.0]),
    (number(most=1), [0, 1.0], [1.1]),
    (choice("a", ""), ["a", ""], ["b", None, 0]),
    (flag(), [True, False], [0, 1, None, "True"]),
    (text(), ["", "a"], [None, 1]),
    (optional(text()), ["a", None], [1]),
    (pattern(), ["", "a.*"], ["(", None]),
    (sequence(), [(), [1]], ["ab", None]),
    (sequence(is_integer), [(), [1]], [(True,), (0.5,)]),
    (SEED, [0, 2**32 - 1], [-1, 2**32, 1.0, True]),
    (weights("a", "b"), [{}, {"a": 1}, {"a": 0, "b": 0.5}], [{"a": 0}, {"c": 1}, {"a": -1}, ()]),
  ],
)
def test_a_rule_takes_what_it_should(rule, taken, refused):
  assert [value for value in taken if not rule.accepts(value)] == []
  assert [value for value in refused if rule.accepts(value)] == []


@pytest.mark.parametrize(
  "rule, remedy",
  [
    (count(), "a positive integer"),
    (count(0), "an integer of 0 or more"),
    (number(), "a number from 0"),
    (number(above=0), "a number above 0"),
    (number(most=1), "a number from 0 to 1"),
    (choice("a", ""), "a or ''"),
  ],
)
def test_a_rule_says_what_to_give(rule, remedy):
  assert rule.remedy == remedy


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)])
def test_an_argument_becomes_a_number_of_python(three):
  found = argument("size", three, count())
  assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [0, 3.0, True, np.True_, np.float32(3), "3", np.array([3]), None])
def test_an_argument_that_a_rule_refuses_is_named(value):
  with pytest.raises(InputError, match=r"^size is .*: give a positive integer$") as error:
    argument("size", value, count())
  assert "\n" not in str(error.value)
