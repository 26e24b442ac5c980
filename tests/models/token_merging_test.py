import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from tests.models.small_models import normal
from videochat_flash_jax.models.token_merging import (
  match_tokens,
  merge_groups,
  merge_schedule,
  merge_tokens,
  similarity_features,
)

TARGET, HEADS = 6, 2


@jax.jit
def merge(x):
  """The merged tokens, and the place of the one that each token ends in."""
  groups = merge_groups(similarity_features(x, HEADS), target=TARGET)
  return merge_tokens(x, target=TARGET, num_heads=HEADS), groups


def test_a_schedule_halves_until_the_target():
  assert merge_schedule(784, 64) == [392, 196, 98, 34]
  assert merge_schedule(7, 3) == [3, 1]
  assert merge_schedule(64, 64) == []


def test_the_worked_example_of_the_docstring():
  degrees = jnp.deg2rad(jnp.array([3.0, 90.0, -30.0, 5.0, 79.0, 180.0]))
  features = jnp.stack([jnp.cos(degrees), jnp.sin(degrees)], axis=-1)[None]
  np.testing.assert_array_equal(match_tokens(features, 2), [[2, 1, 0, 2, 1, 3]])


@pytest.mark.parametrize("num_removed", [1, 3, 4])
def test_equal_similarities_keep_the_order_of_their_places(num_removed):
  features = jnp.ones((1, 8, 3))  # a still scene: all tokens are the same
  staying = 4 - num_removed
  expected = np.empty(8, int)
  expected[::2] = [staying] * num_removed + list(range(staying))
  expected[1::2] = staying + np.arange(4)
  np.testing.assert_array_equal(match_tokens(features, num_removed)[0], expected)


def test_a_still_scene_merges_to_what_it_shows():
  token = normal(3, 1, 8)
  merged, _ = merge(jnp.tile(token, (1, 40, 1)))
  assert_close(merged, jnp.tile(token, (1, TARGET, 1)), relative=2e-6)


@jax.jit
def weighted_gradient(x, weight):
  return jax.grad(lambda x: (merge(x)[0] * weight).sum())(x)


@pytest.mark.parametrize("zeros", [slice(0, 1), slice(3, 9), slice(None)])
def test_vectors_of_zeros_give_finite_tokens_and_gradients(zeros):
  x = normal(3, 40, 8).at[:, zeros].set(0.0)
  merged, groups = merge(x)
  assert jnp.isfinite(merged).all()
  assert jnp.isfinite(weighted_gradient(x, jnp.ones_like(merged))).all()
  np.testing.assert_array_equal(np.unique(groups), np.arange(TARGET))


@pytest.mark.parametrize("num_tokens", [TARGET + 1, 33, 40])
def test_every_token_is_the_mean_of_its_group_and_sums_are_kept(num_tokens):
  x = normal(3, num_tokens, 8)
  for tokens, merged, group in zip(np.asarray(x), *merge(x), strict=True):
    means = np.stack([tokens[group == place].mean(axis=0) for place in range(TARGET)])
    assert_close(merged, means, relative=2e-6)
    assert_close(np.bincount(group) @ np.asarray(merged), tokens.sum(axis=0), absolute=1e-5)


def test_a_gradient_is_shared_by_the_members_of_a_group():
  x, weight = normal(3, 40, 8), normal(3, TARGET, 8, seed=1)
  _, groups = merge(x)
  expected = [w[group] / np.bincount(group)[group][:, None]
              for w, group in zip(weight, np.asarray(groups), strict=True)]  # fmt: skip
  assert_close(weighted_gradient(x, weight), np.stack(expected), relative=2e-6)


def test_a_clip_merges_alike_alone_and_in_a_batch():
  x = normal(3, 40, 8)
  merged, groups = merge(x)
  for clip in range(len(x)):
    alone, group = merge(x[clip : clip + 1])
    np.testing.assert_array_equal(group[0], groups[clip])
    assert_close(alone[0], merged[clip], relative=2e-6)


def test_nothing_to_merge_leaves_tokens_as_they_are():
  x = normal(3, TARGET, 8)
  np.testing.assert_array_equal(merge(x)[0], x)


def test_too_few_tokens_are_refused():
  with pytest.raises(ValueError, match="cannot merge 5 tokens to 6"):
    merge(normal(1, 5, 8))


def test_bfloat16_tokens_are_compared_in_float32():
  x = normal(3, 40, 8).astype(jnp.bfloat16)
  merged, groups = merge(x)
  exact, exact_groups = merge(x.astype(jnp.float32))
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(groups, exact_groups)
  assert_close(merged.astype(jnp.float32), exact, relative=2**-8)
