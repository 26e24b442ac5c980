"""Sparse reading of every kind of file gives what decoding everything and picking gives."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.data.media.odd_videos import ODD_VIDEOS, make_odd_video
from tests.data.media.video_files import decode_everything
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import open_video


def orders(num_frames: int) -> dict[str, list[int]]:
  choose = random.Random(0)
  some = [choose.randrange(num_frames) for _ in range(12)]
  return {
    "rising": sorted(some),
    "any order": some,
    "neighbours": [i for start in sorted(some)[::4] for i in range(start, num_frames)[:3]],
    "repeated": sorted(some[:4] * 3),
    "the last, the first": [num_frames - 1, 0, num_frames - 1],
    "every third": list(range(0, num_frames, 3))[:40],
  }


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow if odd.num_frames > 1000 else ())
    for name, odd in ODD_VIDEOS.items()
  ],
)
def test_picked_frames_are_those_of_decoding_everything(tmp_path, name, caplog):
  odd = make_odd_video(tmp_path / name)
  expected = decode_everything(tmp_path / name)
  assert (expected[1:] != expected[:-1]).any(axis=(1, 2, 3)).all()  # else a wrong one might pass
  assert len(expected) == odd.num_frames or not odd.counts_on
  expected = np.rot90(expected, odd.rotation // 90, axes=(1, 2))
  for num_threads in (1, 3):
    with open_video(tmp_path / name, num_threads=num_threads) as video:
      assert video.info.num_frames == len(expected)
      for order, indices in orders(len(expected)).items():
        wanted, message = expected[indices], f"{order}, {num_threads} threads"
        np.testing.assert_array_equal(video.read(indices), wanted, err_msg=message)
        resized = video.read(indices, image_size=(20, 24))
        np.testing.assert_array_equal(resized, resize(wanted, (20, 24)), err_msg=message)
  assert not caplog.records  # no frame stood in for another


def test_the_set_is_as_large_and_as_mixed_as_promised():
  assert len(ODD_VIDEOS) >= 40
  assert {Path(name).suffix for name in ODD_VIDEOS} >= {
    ".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".gif",
  }  # fmt: skip
  assert {odd.num_frames for odd in ODD_VIDEOS.values()} >= {1, 20_000}
