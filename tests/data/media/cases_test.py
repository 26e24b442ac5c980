"""Small files that people really have: their length, their frames, and how they are shown."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.media.numbered_videos import number_shown
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import open_video

CASES = Path(__file__).parents[2] / "cases" / "media"
EXPECTED = json.loads((CASES / "expected.json").read_text())
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def numbers_of(case: dict) -> list[int]:
  numbers = case["numbers"]
  if isinstance(numbers, list):
    return numbers
  first, last = map(int, numbers.split(".."))
  return list(range(first, last + 1))


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case["file"])
def test_length_number_and_size_of_the_frames(case):
  with open_video(CASES / case["file"]) as video:
    assert video.info.num_frames == case["frames"]
    if "seconds" in case:
      assert video.info.seconds == pytest.approx(
        case["seconds"], abs=min(0.5, case["seconds"] / 10)
      )
    if "size" in case:
      assert [video.info.height, video.info.width] == case["size"]


@pytest.mark.parametrize("case", [c for c in EXPECTED if "numbers" in c], ids=lambda c: c["file"])
def test_frames_read_singly_sparsely_and_in_order_show_their_numbers(case):
  path, numbers = CASES / case["file"], numbers_of(case)
  every = list(range(len(numbers)))
  sparse = every[:: max(1, len(numbers) // 7)]
  backwards = sparse[::-1]
  for num_threads in (1, 4):
    for order in (every, sparse, backwards):
      with open_video(path, num_threads=num_threads) as video:
        read = [number_shown(frame) for frame in video.read(order)]
        assert read == [numbers[index] for index in order]
        small = [number_shown(frame) for frame in video.read(order, 32)]
        assert small == [numbers[index] for index in order]
        assert not video.damaged
  for index in sparse:
    with open_video(path, num_threads=1) as video:
      assert number_shown(video.read([index])[0]) == numbers[index]


@pytest.mark.parametrize("case", [c for c in EXPECTED if "quarters" in c], ids=lambda c: c["file"])
def test_a_picture_is_turned_and_mirrored_as_players_do(case):
  with open_video(CASES / case["file"]) as video:
    quarters = resize(video.read([0])[0], 8)[2::4, 2::4].reshape(4, 3).astype(int)
  for quarter, colour in zip(quarters, case["quarters"], strict=True):
    np.testing.assert_allclose(quarter, COLOURS[colour], atol=40)
