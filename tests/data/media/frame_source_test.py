"""Frames of an iterator, and what all sources tell."""

import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.data.media.ahead import Ahead
from videochat_flash_jax.data.media.frame_source import IteratorSource, file_name
from videochat_flash_jax.errors import InputError

SIZE = 8


def plain(number: int, height: int = 12, width: int = 16) -> np.ndarray:
  """A picture of one gray that tells its number."""
  return np.full((height, width, 3), number, np.uint8)


def camera(num_frames: int | None = None):
  numbers = itertools.count() if num_frames is None else range(num_frames)
  return (plain(number) for number in numbers)


def grays(frames) -> list[int]:
  """The numbers of frames made by `plain`."""
  return [int(frame[0, 0, 0]) for frame in frames]


def given(source: IteratorSource) -> tuple[list[int], str]:
  """The numbers of the frames that come before an error, and its text."""
  frames = []
  with pytest.raises(InputError) as raised:
    frames.extend(source.frames(SIZE))
  assert "\n" not in str(raised.value)
  return grays(frames), str(raised.value)


def test_an_iterator_gives_resized_frames_and_repeats_the_last_one():
  source = IteratorSource(camera(5), "frames", 100, fps=2)
  frames = list(source.frames(SIZE))
  assert {(frame.dtype, frame.shape) for frame in frames} == {(np.dtype(np.uint8), (8, 8, 3))}
  assert grays(frames) == [0, 1, 2, 3, 4, 4, 4, 4]
  assert source.times == [0, 0.5, 1, 1.5, 2, 2, 2, 2]
  assert (source.num_frames, source.num_seen, source.seconds) == (8, 5, 2.5)


def test_what_an_iterator_tells_grows_and_its_number_of_frames_is_unknown_until_the_end():
  source = IteratorSource(camera(4), "frames", 100)
  frames = source.frames(SIZE)
  assert (source.num_frames, source.num_seen, source.times, source.seconds) == (None, 0, [], 0)
  next(frames)
  next(frames)
  assert (source.num_frames, source.num_seen, source.times, source.seconds) == (None, 2, [0, 1], 2)
  assert len(list(frames)) == 2 and source.num_frames == 4


@pytest.mark.parametrize("stall_seconds", [None, 30.0])
def test_not_one_frame_more_is_taken_than_is_given(stall_seconds):
  frames = camera()
  for expected in ([0, 1, 2, 3], [4, 5, 6, 7]):
    with IteratorSource(frames, "frames", 6, stall_seconds=stall_seconds) as source:
      assert grays(source.frames(SIZE)) == expected
  assert grays([next(frames)]) == [8]


@pytest.mark.parametrize("stall_seconds", [None, 30.0])
def test_a_camera_may_write_all_frames_into_one_array(stall_seconds):
  def reusing():
    buffer = plain(0)
    for number in range(40):
      buffer[:] = number
      yield buffer

  source = IteratorSource(reusing(), "frames", 99, stall_seconds=stall_seconds)
  assert grays(source.frames(SIZE)) == list(range(40))


def test_skipped_frames_are_no_stall():
  def slow():
    for number in range(12):
      time.sleep(0.06)
      yield plain(number)

  source = IteratorSource(slow(), "frames", 99, start=8, stall_seconds=0.4)
  assert grays(source.frames(SIZE)) == [8, 9, 10, 11]


def test_start_end_and_the_bound_hold_together():
  def numbers(**options):
    return grays(IteratorSource(camera(40), "frames", **options).frames(SIZE))

  assert numbers(max_frames=99, fps=2, start=1.2, end=3.2) == [2, 3, 4, 5, 6, 6, 6, 6]
  assert numbers(max_frames=4, fps=2, start=1.2, end=3.2) == [2, 3, 4, 5]
  assert numbers(max_frames=99, fps=100, start=0.29, end=0.33) == [29, 30, 31, 32]
  assert numbers(max_frames=2, start=38) == [38, 39, 39, 39]


def test_numbers_beyond_all_bounds_end_without_a_frame():
  assert "earlier start" in given(IteratorSource(camera(3), "f", 9, fps=1e300, start=1e300))[1]


def test_the_end_is_not_awaited_where_time_tells_that_no_frame_is_wanted():
  def four():
    yield from camera(4)
    raise AssertionError("a fifth frame was asked for")

  assert grays(IteratorSource(four(), "frames", 99, end=4).frames(SIZE)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
  "broken, message",
  [
    (None, "frame 2 is of type NoneType; give"),
    ([[1]], "frame 2 is of type list; give"),
    (plain(0, height=11), "frame 2 is 16x11, those before are 16x12; give frames of one size"),
    (plain(0) / 255, r"frame 2: the image is float64 (12, 16, 3); give uint8"),
    (plain(0)[None], "frame 2: the image is uint8 (1, 12, 16, 3); give"),
    (np.zeros((0, 4, 3), np.uint8), "frame 2: the image has no pixels"),
    ("no/such.png", "frame 2: no/such.png: there is no such image file"),
  ],
)
def test_a_broken_frame_is_an_error_after_those_before_it(broken, message):
  source = IteratorSource(iter([plain(7), plain(8), broken, plain(9)]), "frames", 99)
  numbers, error = given(source)
  assert numbers == [7, 8]
  assert source.times == [0, 1]
  assert error.startswith(message)


def test_an_error_of_the_iterator_names_the_frame_that_did_not_come():
  def failing():
    yield plain(3)
    raise ConnectionError("the camera\nwas unplugged" + 200 * "!")

  numbers, error = given(IteratorSource(failing(), "frames", 99))
  assert numbers == [3]
  assert error.startswith("frame 1 did not come (ConnectionError: the camera")
  assert error.endswith("check what the iterator reads") and len(error) < 200


def test_an_iterator_that_stalls_is_an_error_and_its_frames_so_far_are_given():
  goes_on = threading.Event()

  def stalled():
    yield plain(1)
    yield plain(2)
    goes_on.wait(30)

  start = time.monotonic()
  numbers, error = given(IteratorSource(stalled(), "frames", 99, stall_seconds=0.2))
  goes_on.set()
  assert numbers == [1, 2]
  assert error.startswith("frame 2 did not come (TimeoutError: nothing came for 0.2 s)")
  assert time.monotonic() - start < 10


def test_an_iterator_without_a_frame_is_an_input_error():
  assert "earlier start" in given(IteratorSource(iter([]), "frames", 99))[1]
  assert "earlier start" in given(IteratorSource(camera(3), "frames", 99, start=3))[1]


def test_frames_may_be_pillow_images_and_paths_and_gray(tmp_path):
  Image.fromarray(plain(5)).save(tmp_path / "5.png")
  pictures = [str(tmp_path / "5.png"), Image.fromarray(plain(6)), plain(7)[..., 0], plain(8)]
  source = IteratorSource(iter(pictures), "frames", 99)
  assert grays(source.frames(SIZE)) == [5, 6, 7, 8]


def test_a_bound_that_the_user_did_not_give_is_told(caplog):
  list(IteratorSource(camera(), "frames", 4, warns=True).frames(SIZE))
  assert [record.getMessage() for record in caplog.records] == [
    "frames: watched 4 frames, the model's own bound, and no more; max_frames sets another bound"
  ]
  caplog.clear()
  list(IteratorSource(camera(3), "frames", 4, warns=True).frames(SIZE))
  list(IteratorSource(camera(), "frames", 4).frames(SIZE))
  assert not caplog.records


def test_a_users_generator_is_left_open_and_goes_on_after_a_break():
  frames = camera()
  watched = IteratorSource(frames, "frames", 99).frames(SIZE)
  next(watched)
  watched.close()
  assert grays([next(frames)]) == [1]


def test_frames_that_are_read_ahead_come_before_the_error_of_a_later_one():
  source = IteratorSource(iter([plain(1), plain(2), None]), "frames", 99)
  frames = []
  with pytest.raises(InputError, match="frame 2"), Ahead(source.frames(SIZE), 8) as waiting:
    frames.extend(waiting)
  assert grays(frames) == [1, 2]


@pytest.mark.parametrize(
  "path, name",
  [
    ("a/match.mp4", "match.mp4"),
    ("a/pictures/", "pictures"),
    ("https://host/a/match.mp4?token=1/2", "match.mp4"),
    ("a/what?.mp4", "what?.mp4"),
    ("a\nb.mp4", r"a\nb.mp4"),
  ],
)
def test_the_name_of_a_path_is_its_last_part(path, name):
  assert file_name(path) == name
