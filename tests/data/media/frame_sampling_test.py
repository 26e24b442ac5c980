import numpy as np
import pytest

from videochat_flash_jax.data.media.frame_sampling import (
  clip_indices,
  dynamic_num_frames,
  evenly_spaced_indices,
  fixed_rate_indices,
  inference_indices,
  interval_indices,
  limited_indices,
  training_indices,
)
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig

RELEASED = SamplingConfig(min_frames=64, max_frames=512, local_frames=8)
TINY = SamplingConfig(min_frames=4, max_frames=512, local_frames=4)


@pytest.mark.parametrize(
  "seconds, expected",
  [
    (2.2, 64),
    (10, 64),
    (64, 64),
    (71.9, 64),
    (72, 72),
    (100, 96),
    (511, 504),
    (512, 512),
    (10_000, 512),
  ],
)
def test_released_models_watch_one_frame_a_second_within_bounds(seconds, expected):
  indices = inference_indices(round(30 * seconds), 30.0, RELEASED)
  assert len(indices) == expected
  assert indices.dtype == np.int64


def test_each_frame_is_the_middle_of_its_interval():
  assert inference_indices(8 * 30, 30.0, TINY).tolist() == [14, 44, 74, 104, 134, 164, 194, 224]


@pytest.mark.parametrize(
  "num_frames, expected",
  [(63, 56), (20, 16), (8, 8), (7, 8), (1, 8)],
)
def test_a_video_with_fewer_frames_than_the_minimum_gives_the_groups_it_fills(num_frames, expected):
  indices = inference_indices(num_frames, 30.0, RELEASED)
  assert len(indices) == expected
  assert len(set(indices.tolist())) == min(num_frames, expected)
  assert indices.max() <= num_frames - 1


def test_a_video_of_one_frame_repeats_it():
  assert inference_indices(1, 25.0, TINY).tolist() == [0, 0, 0, 0]


def test_a_short_video_repeats_its_last_frame():
  assert inference_indices(3, 25.0, TINY).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
  "max_frames, expected",
  [
    (None, [0, 1, 2, 3, 5, 6, 7, 8]),
    (8, [0, 1, 2, 3, 5, 6, 7, 8]),
    (7, [0, 3, 5, 8]),
    (4, [0, 3, 5, 8]),
    (3, [1, 4, 7, 7]),
    (1, [4, 4, 4, 4]),
  ],
)
def test_the_users_bound_wins_over_both_bounds_of_the_model(max_frames, expected):
  for sampling in (TINY, SamplingConfig(min_frames=8, max_frames=8, local_frames=4)):
    assert inference_indices(10, 1.0, sampling, max_frames).tolist() == expected


def test_the_user_can_ask_for_more_than_the_models_own_bound():
  assert len(inference_indices(2000, 1.0, RELEASED)) == 512
  assert len(inference_indices(2000, 1.0, RELEASED, max_frames=1000)) == 1000
  assert len(inference_indices(2000, 1.0, RELEASED, max_frames=10_000)) == 2000


def test_inference_always_gives_whole_clips_of_rising_frames():
  for sampling in (RELEASED, TINY, SamplingConfig(min_frames=1, max_frames=30, local_frames=2)):
    for num_frames in (*range(1, 70), 250, 1001):
      for max_frames in (None, 1, 3, 5, 30, 600):
        indices = inference_indices(num_frames, 12.5, sampling, max_frames)
        assert len(indices) > 0
        assert len(indices) % 4 == 0
        assert (np.diff(indices) >= 0).all()
        assert 0 <= indices[0] <= indices[-1] < num_frames
        if max_frames is not None:
          assert len(set(indices.tolist())) <= max_frames


@pytest.mark.parametrize(
  "limit, expected",
  [
    (99, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]),
    (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]),
    (9, [0, 1, 2, 3, 5, 6, 7, 8]),
    (4, [0, 3, 5, 8]),
    (3, [1, 4, 7, 7]),
    (1, [4, 4, 4, 4]),
  ],
)
def test_all_frames_are_picked_or_evenly_spaced_ones_within_a_limit(limit, expected):
  assert limited_indices(10, limit).tolist() == expected


def test_a_bound_below_a_clip_bounds_the_different_frames_with_every_sampling():
  for sampling in (RELEASED, TINY):
    for num_frames in (1, 2, 3, 4, 5, 100, 3000):
      for max_frames in (1, 2, 3):
        indices = inference_indices(num_frames, 30.0, sampling, max_frames)
        assert len(indices) == 4
        assert len(set(indices.tolist())) == min(num_frames, max_frames)


def test_bad_bounds_and_empty_videos_are_input_errors():
  with pytest.raises(InputError, match="at least 1"):
    inference_indices(10, 1.0, TINY, max_frames=0)
  with pytest.raises(InputError, match="no frame"):
    inference_indices(0, 1.0, TINY)


def test_docstring_examples_hold():
  def count(num_frames: int, min_frames: int = 1) -> int:
    return dynamic_num_frames(num_frames, 1.0, min_frames=min_frames, max_frames=64, local_frames=4)

  assert [count(3), count(7), count(8), count(300), count(7, 64)] == [4, 4, 8, 64, 4]
  assert interval_indices(10, 4).tolist() == [0, 3, 5, 8]
  assert interval_indices(10, 4, offset=0).tolist() == [0, 2, 5, 7]
  assert interval_indices(3, 4).tolist() == [0, 1, 2, 2]
  assert fixed_rate_indices(10, 2.0, 1.0).tolist() == [1, 3, 5, 7, 9]
  assert fixed_rate_indices(10, 2.0, 1.0, max_frames=2).tolist() == [1, 3]
  assert fixed_rate_indices(1, 2.0, 0.5).tolist() == []
  assert evenly_spaced_indices(10, 4).tolist() == [1, 3, 5, 8]
  assert clip_indices(300, 30.0, 5.0, 9.0, 4).tolist() == [164, 194, 224, 253]
  examples = {"middle": [2, 7, 12, 17], "dynamic_fps1": [2, 9, 16], "fps0.5": [2, 6, 10]}
  for word, expected in examples.items():
    assert training_indices(word, 20, 2.0, num_picks=4, max_frames=3).tolist() == expected


@pytest.mark.parametrize("word", ["Middle", "dynamic_fps2", "dynamic", "fps", "fps0", "fps-1", ""])
def test_a_misspelt_sampling_word_is_an_input_error(word):
  with pytest.raises(InputError, match="unknown sampling"):
    training_indices(word, 10, 1.0, num_picks=4)


def test_a_clip_gives_frames_of_the_clip_and_not_of_the_videos_start():
  whole = clip_indices(900, 30.0, 0.0, 8.0, 4)
  later = clip_indices(900, 30.0, 5.0, 13.0, 4)
  np.testing.assert_array_equal(later, whole + 150)


def test_a_clip_that_outlasts_the_video_ends_with_it():
  np.testing.assert_array_equal(
    clip_indices(300, 30.0, 8.0, 99.0, 4), clip_indices(300, 30.0, 8.0, 10.0, 4)
  )


@pytest.mark.parametrize("start, end", [(5.0, 5.0), (6.0, 5.0), (10.0, 12.0), (-3.0, -1.0)])
def test_a_clip_without_frames_is_an_input_error(start, end):
  with pytest.raises(InputError, match="holds no frame"):
    clip_indices(300, 30.0, start, end, 4)
