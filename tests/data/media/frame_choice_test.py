import numpy as np
import pytest

from videochat_flash_jax.data.media.frame_choice import (
  VideoPart,
  frames_at,
  part_between,
  sampled_frames,
)
from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig

RELEASED = SamplingConfig(min_frames=64, max_frames=512, local_frames=8)


def whole(num_frames: int, fps: float) -> VideoPart:
  return VideoPart(0.0, num_frames / fps, range(num_frames), fps)


def test_without_a_rate_the_frames_of_a_part_are_those_of_inference():
  part = VideoPart(10.0, 110.0, range(300, 3300), 30.0)
  choice = sampled_frames(part, RELEASED, max_frames=80)
  expected = 300 + inference_indices(3000, 30.0, RELEASED, 80)
  np.testing.assert_array_equal(choice.indices, expected)
  np.testing.assert_allclose(choice.frame_seconds, expected / 30.0)
  assert choice.seconds == 100.0


@pytest.mark.parametrize(
  "rate, max_frames, num_frames, num_distinct",
  [
    (2.0, None, 20, 20),
    (2.0, 10, 8, 8),  # the bound holds
    (0.5, 10, 4, 4),  # the rate holds: 5 frames, in whole clips
    (0.3, None, 4, 3),
    (0.01, None, 4, 1),
    (2.0, 3, 4, 3),
    (100.0, None, 300, 300),  # as many as there are
    (1e300, None, 300, 300),
  ],
)
def test_a_rate_and_a_bound_hold_together(rate, max_frames, num_frames, num_distinct):
  indices = sampled_frames(whole(300, 30.0), RELEASED, max_frames, rate).indices
  assert len(indices) == num_frames
  assert len(set(indices.tolist())) == num_distinct


def test_the_frames_of_a_rate_are_the_middles_of_its_steps():
  choice = sampled_frames(whole(240, 24.0), RELEASED, None, 2.0)
  np.testing.assert_array_equal(choice.indices, 5 + 12 * np.arange(20))


def test_a_product_of_seconds_and_rate_loses_no_frame_to_rounding():
  assert 0.57 * 100 < 57
  choice = sampled_frames(VideoPart(0.0, 0.57, range(57), 100.0), RELEASED, None, 100.0)
  assert choice.indices.tolist() == [*range(57), 56, 56, 56]


def test_the_models_bound_counts_for_a_rate():
  assert len(sampled_frames(whole(30_000, 30.0), RELEASED, None, 10.0).indices) == 512


@pytest.mark.parametrize(
  "start, end, expected",
  [
    (None, None, (0.0, 4.0, range(4))),
    (1.5, None, (1.5, 4.0, range(1, 4))),
    (1, 3, (1, 3, range(1, 3))),
    (None, 99, (0.0, 4.0, range(4))),
    (2.1, 2.2, (2.1, 2.2, range(2, 3))),
    (0, 2.5, (0.0, 2.5, range(3))),
  ],
)
def test_a_part_has_what_is_shown_between_two_times(start, end, expected):
  assert part_between(np.arange(4.0), 4.0, start, end) == expected


def test_a_part_of_frames_at_any_times_begins_with_the_first_one():
  times = np.array([5.0, 6.0, 20.0])
  assert part_between(times, 27.5, None, None) == (5.0, 27.5, range(3))
  assert part_between(times, 27.5, 1.0, 19.0) == (5.0, 19.0, range(2))
  assert part_between(times, 27.5, 10.0, None) == (10.0, 27.5, range(1, 3))


@pytest.mark.parametrize("start, end, message", [(12.5, 13, "start is"), (None, 5.0, "end is")])
def test_a_part_outside_of_the_video_is_an_input_error(start, end, message):
  with pytest.raises(InputError, match=message):
    part_between(np.array([5.0, 6.0]), 12.5, start, end)


def test_the_users_times_are_kept_and_the_last_one_fills_the_clip():
  choice = frames_at(whole(24, 2.0), np.array([0.0, 1.2, 7.5, 11.99, 12.0]))
  assert choice.indices.tolist() == [0, 2, 15, 23, 23, 23, 23, 23]
  assert choice.frame_seconds.tolist() == [0.0, 1.2, 7.5, 11.99, 12.0, 12.0, 12.0, 12.0]
  assert choice.seconds == 12.0


@pytest.mark.parametrize("fps", [1.0, 24.0, 25.0, 30_000 / 1001, 30.0, 59.94])
def test_the_time_of_a_frame_finds_this_frame(fps):
  times = np.arange(4000) / fps
  np.testing.assert_array_equal(frames_at(whole(4000, fps), times).indices, np.arange(4000))


def test_a_time_outside_of_the_part_is_an_input_error_that_names_it():
  part = VideoPart(2.0, 6.0, range(4, 12), 2.0)
  for times in ([3.0, 6.5], [1.9, 3.0]):
    index = 1 if times[1] > 6 else 0
    with pytest.raises(InputError, match=rf"times\[{index}\] is .* from 2 to 6"):
      frames_at(part, np.array(times))
