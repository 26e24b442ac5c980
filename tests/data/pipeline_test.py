"""Batches: fixed shapes, packed rows that keep examples apart, the same for the same seed."""

import numpy as np

from videochat_flash_jax.data.conversation import IGNORE_LABEL
from videochat_flash_jax.data.pipeline import clip_batches, packed_batches

CLIP_TOKENS = 2


def draw(rng):
  """An example of 1 to 3 clips whose pixels, tokens and labels all hold one number."""
  num_clips = int(rng.integers(1, 4))
  mark = int(rng.integers(1, 200))
  num_visual = CLIP_TOKENS * num_clips
  return {
    "frames": np.full((num_clips, 4, 2, 2, 3), mark, np.uint8),
    "token_ids": np.full(num_visual + 3, mark, np.int32),
    "labels": np.full(num_visual + 3, mark, np.int32),
    "visual_index": np.array([-1, *range(num_visual), -1, -1], np.int32),
  }


def packed(seed):
  return packed_batches(draw, 3, num_tokens=20, num_clips=5, clip_tokens=CLIP_TOKENS, seed=seed)


def test_clips_of_several_examples_become_one_batch():
  def draw_two(rng):
    return {"frames": np.full((2, 4, 2, 2, 3), rng.integers(200)), "kinds": np.zeros((2, 7))}

  batch = next(clip_batches(draw_two, 5, seed=0))
  assert batch["frames"].shape == (10, 4, 2, 2, 3) and batch["kinds"].shape == (10, 7)


def test_every_visual_place_of_a_packed_row_reads_a_clip_of_its_own_example():
  batches = packed(0)
  num_segments = []
  for batch in (next(batches) for _ in range(4)):
    assert batch["frames"].shape == (3, 5, 4, 2, 2, 3) and batch["token_ids"].shape == (3, 20)
    is_visual = batch["visual_index"] >= 0
    clip = np.repeat(batch["frames"][:, :, 0, 0, 0, 0], CLIP_TOKENS, axis=1)
    seen = np.take_along_axis(clip, np.maximum(batch["visual_index"], 0), axis=1)
    np.testing.assert_array_equal(seen[is_visual], batch["token_ids"][is_visual])
    num_segments.append(batch["segment_ids"].max())
  assert max(num_segments) > 1


def test_padding_is_segment_zero_and_neither_visual_nor_learnt():
  batch = next(packed(0))
  padding = batch["segment_ids"] == 0
  assert padding.any()
  assert (batch["visual_index"][padding] == -1).all()
  assert (batch["labels"][padding] == IGNORE_LABEL).all()


def test_positions_start_anew_in_every_segment():
  batch = next(packed(0))
  for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
    for segment in range(1, segments.max() + 1):
      own = positions[segments == segment]
      np.testing.assert_array_equal(own, np.arange(len(own)))


def test_batches_are_the_same_for_the_same_seed_and_differ_for_another():
  one, same, other = (next(packed(seed)) for seed in (1, 1, 2))
  for name in one:
    np.testing.assert_array_equal(one[name], same[name])
  assert not np.array_equal(one["token_ids"], other["token_ids"])
