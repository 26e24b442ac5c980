"""Token merging of the original, golden family 03: every round, whole merges, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import Golden, assert_close
from videochat_flash_jax.models.token_merging import (
  match_tokens,
  merge_schedule,
  merge_tokens,
  similarity_features,
  sum_groups,
)

MANIFEST = Golden("03_tome").json()
TOLERANCE = 2e-6


@functools.partial(jax.jit, static_argnames=("num_heads", "num_removed"))
def merge_once(x, size, num_heads, num_removed):
  """One round on tokens of given sizes: the groups, averaged tokens, and their sizes."""
  group = match_tokens(similarity_features(x, num_heads), num_removed)
  num_groups = x.shape[1] - num_removed
  total = sum_groups(x * size[..., None], group, num_groups)
  size = sum_groups(size[..., None], group, num_groups)[..., 0]
  return group, total / size[..., None], size


def stored_choices(assign, unmerged):
  """Groups as the original stores them: destinations of sources (-1 stays), and who stays."""
  num_staying = unmerged.shape[1]
  group = np.where(assign >= 0, assign + num_staying, -1)
  for row, stays in enumerate(unmerged):
    group[row, stays] = np.arange(num_staying)
  return group


def assert_group(group, assign, unmerged):
  group = np.asarray(group)
  np.testing.assert_array_equal(group[:, ::2], stored_choices(assign, unmerged))
  destinations = unmerged.shape[1] + np.arange(group.shape[1] // 2)
  np.testing.assert_array_equal(group[:, 1::2], np.broadcast_to(destinations, group[:, 1::2].shape))


@pytest.mark.parametrize("combo", MANIFEST["combos"], ids=lambda combo: combo["name"])
def test_every_round_makes_the_official_choices(golden, combo):
  tensors = golden("03_tome").tensors(combo["name"])
  x, size = tensors["x"], np.ones(tensors["x"].shape[:2], np.float32)
  rounds = combo["rounds"]
  assert merge_schedule(combo["p"], combo["target"]) == [step["r"] for step in rounds]
  for number, step in enumerate(rounds):
    group, x, size = merge_once(x, size, combo["heads"], step["r"])
    assert x.shape[1] == step["p_out"]
    assert_group(group, tensors[f"round{number}_assign"], tensors[f"round{number}_unm_idx"])
    np.testing.assert_array_equal(size, tensors[f"round{number}_size"])
    if f"round{number}_x" in tensors:
      assert_close(x, tensors[f"round{number}_x"], relative=TOLERANCE)
  assert_close(x, tensors["out"], relative=TOLERANCE)


@functools.partial(jax.jit, static_argnames=("target", "num_heads"))
def merge_and_gradient(x, grad_out, target, num_heads):
  out, vjp = jax.vjp(lambda x: merge_tokens(x, target=target, num_heads=num_heads), x)
  return out, vjp(grad_out)[0]


@pytest.mark.parametrize("combo", MANIFEST["combos"], ids=lambda combo: combo["name"])
def test_merging_all_rounds_at_once_agrees_and_so_do_gradients(golden, combo):
  tensors = golden("03_tome").tensors(combo["name"])
  grad_out = tensors.get("grad_w", np.zeros_like(tensors["out"]))
  out, grad = merge_and_gradient(tensors["x"], grad_out, combo["target"], combo["heads"])
  assert_close(out, tensors["out"], relative=TOLERANCE)
  if "grad_x" in tensors:
    assert_close(grad, tensors["grad_x"], relative=TOLERANCE)


def test_some_combination_stores_gradients_and_tokens_of_rounds(golden):
  stored = {key for combo in MANIFEST["combos"] for key in golden("03_tome").tensors(combo["name"])}
  assert {"grad_x", "round0_x"} <= stored


@functools.partial(jax.jit, static_argnames="num_removed")
def match_and_merge(x, size, metric, num_removed):
  """One matching by a given metric; names of results are those of the golden file."""
  group = match_tokens(metric, num_removed)
  num_groups = x.shape[1] - num_removed
  summed = sum_groups(x, group, num_groups)
  sizes = sum_groups(size, group, num_groups)
  return group, {
    "merge_sum": summed,
    "unmerge_of_merge": jnp.take_along_axis(summed, group[..., None], axis=1),
    "wavg_x": sum_groups(x * size, group, num_groups) / sizes,
    "wavg_size": sizes,
  }


@pytest.mark.parametrize("row", MANIFEST["matching"], ids=lambda row: f"r={row['r']}")
def test_one_matching_merges_and_unmerges_tokens_of_given_sizes(golden, row):
  tensors = golden("03_tome").tensors("matching")
  group, merged = match_and_merge(tensors["x"], tensors["size"], tensors["metric"], row["r"])
  key = f"r{row['r']}_"
  assert_group(group, tensors[key + "assign"], tensors[key + "unm_idx"])
  for name, tokens in merged.items():
    assert_close(tokens, tensors[key + name], relative=TOLERANCE)
  assert list(merged["wavg_x"].shape) == row["shape_after"]


def test_schedules_agree(golden):
  schedules = golden("03_tome").json("schedules.json")
  assert schedules["columns"] == ["p", "target", "r_merge_list"]
  for num_tokens, target, removed in schedules["rows"]:
    assert merge_schedule(num_tokens, target) == removed, (num_tokens, target)


def test_merging_to_more_tokens_than_there_are_is_refused(golden):
  errors = golden("03_tome").json("schedules.json")["errors"]
  assert errors
  for num_tokens, target, _ in errors:
    if num_tokens == target:  # the original refuses to merge nothing; here that is no round
      assert merge_schedule(num_tokens, target) == []
    else:
      with pytest.raises(ValueError, match=f"cannot merge {num_tokens} tokens to {target}"):
        merge_schedule(num_tokens, target)
