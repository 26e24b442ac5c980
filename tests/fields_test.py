"""Rules of config fields: what each takes, and what it recommends."""

import math

import pytest

from videochat_flash_jax.fields import (
  choice,
  count,
  flag,
  integer,
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
    (integer(), [-1, 0, 3], [1.0, True, None]),
    (number(), [0, 0.5, 3], [-0.1, math.nan, math.inf, True, "1", None]),
    (number(above=0), [1e-9], [0, -1.0]),
    (number(most=1), [0, 1.0], [1.1]),
    (choice("a", ""), ["a", ""], ["b", None, 0]),
    (flag(), [True, False], [0, 1, None, "True"]),
    (text(), ["", "a"], [None, 1]),
    (optional(text()), ["a", None], [1]),
    (pattern(), ["", "a.*"], ["(", None]),
    (sequence(), [(), [1]], ["ab", None]),
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
