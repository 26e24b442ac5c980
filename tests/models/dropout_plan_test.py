"""Plans of what is dropped: counts, spacing, padding; and the configs that cannot be used."""

import dataclasses

import pytest
from flax import nnx

from tests.models.lettered_rows import config_of, plan_of
from tests.models.small_models import CONFIG, DECODER
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import DROPOUT_KINDS, DropoutConfig
from videochat_flash_jax.models.token_dropout import (
  EvenDrop,
  RankedDrop,
  evenly_spaced,
)
from videochat_flash_jax.models.videochat_flash import VideoChatFlash


def kept_indices(plan):
  return [drop.indices.tolist() for drop in plan.drops.values()]


def test_the_plan_of_two_samples_in_a_row_is_that_of_its_docstring():
  plan = plan_of(config_of("uniform0_attention"), "S v v v v ? S v v ?")
  assert kept_indices(plan) == [[[0, 1, 4, 5, 6, 7, 9]], [[0, 1, 2, 4, 5]]]
  assert [type(drop) for drop in plan.drops.values()] == [EvenDrop, RankedDrop]
  assert list(plan.drops) == [1, 2]


@pytest.mark.parametrize(
  "kind, ranked",
  [
    ("uniform", [False, False, False]),
    ("attention", [True, True, True]),
    ("uniform0_attention", [False, True, True]),
    ("uniform1_attention", [False, False, True]),
  ],
)
def test_a_kind_says_from_which_drop_on_attention_chooses(kind, ranked):
  plan = plan_of(config_of(kind, (1, 2, 5), (1.0, 0.7, 0.4, 0.1)), "S v v v v ?")
  assert [isinstance(drop, RankedDrop) for drop in plan.drops.values()] == ranked


def test_counts_are_of_the_first_number_of_visual_tokens_and_cut_off():
  for kind in DROPOUT_KINDS:
    plan = plan_of(config_of(kind, (1, 2), (1.0, 0.7, 0.3)), "S v v v v v v v ?")
    assert [drop.indices.shape[1] for drop in plan.drops.values()] == [2 + 4, 2 + 2]


def test_shorter_rows_and_rows_of_text_are_padded_to_the_longest():
  plan = plan_of(config_of("uniform"), "S v v v v ?", "S v ? v ?", "S ?")
  first, second = kept_indices(plan)
  assert first == [[0, 1, 4, 5], [0, 1, 2, 4], [0, 1, 6, 6]]  # two images are one pool
  assert second == [[0, 1, 3], [0, 2, 3], [0, 1, 4]]


def test_all_visual_tokens_may_go():
  assert kept_indices(plan_of(config_of("attention", (1,), (1.0, 0.1)), "S v v ? v v ?")) == [
    [[0, 1, 2]]
  ]


def test_rows_are_rounded_up_to_the_lengths_of_the_caller():
  plan = plan_of(config_of("uniform"), "S v v v v ?", round_length=lambda n: n + 3)
  assert kept_indices(plan) == [[[0, 1, 4, 5, 6, 6, 6]], [[0, 1, 3, 7, 7, 7]]]


def test_in_training_attention_leaves_samples_without_an_answer_as_they_are():
  rows = ("S v v v v ? S v v ? a", "A v v v v ? A v v ?")
  plan = plan_of(config_of("attention"), *rows, training=True)
  assert [row[-1] for row in kept_indices(plan)[0]] == [9, 9]
  assert kept_indices(plan)[0][0] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  even = plan_of(config_of("uniform"), *rows, training=True)
  assert kept_indices(even)[0][0] == [0, 1, 4, 5, 6, 7, 9, 10]


@pytest.mark.parametrize(
  "field, value",
  [
    ("kind", "random"),
    ("kind", None),
    ("layers", ()),
    ("layers", (0, 1)),
    ("layers", (1, 3)),
    ("layers", (2, 1)),
    ("layers", (1, 1)),
    ("layers", [1, 2]),
    ("layers", (1, True)),
    ("layers", (1.0, 2.0)),
    ("ratios", (1.0, 0.5)),
    ("ratios", (0.9, 0.5, 0.25)),
    ("ratios", (1.0, 0.25, 0.5)),
    ("ratios", (1.0, 0.5, 0.0)),
    ("ratios", (1.0, float("nan"), 0.25)),
    ("ratios", (1.0, "0.5", 0.25)),
    ("ratios", [1.0, 0.5, 0.25]),
  ],
)
def test_a_config_that_cannot_be_used_names_the_field(field, value):
  config = config_of("attention")
  object.__setattr__(config, field, value)  # past the checks of types that tests have
  with pytest.raises(InputError, match=rf"^dropout\.{field} is .*: give [^\n]+$"):
    config.check(DECODER.depth)


def test_a_model_is_not_built_with_a_dropout_beyond_its_depth():
  config = dataclasses.replace(CONFIG, dropout=DropoutConfig.model_card())
  with pytest.raises(InputError, match=r"^dropout\.layers is \(4, 18\): give .* from 1 to 2"):
    nnx.eval_shape(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0)))


def test_usable_configs_pass():
  for kind in DROPOUT_KINDS:
    config_of(kind, (1, 2), (1.0, 1.0, 0.01)).check(3)
  DropoutConfig.model_card().check(28)


def test_even_spacing_takes_both_ends():
  assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
  assert evenly_spaced(10, 1).tolist() == [0]
  assert evenly_spaced(10, 0).tolist() == []
  assert evenly_spaced(7, 7).tolist() == list(range(7))
