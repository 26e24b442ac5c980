"""Whatever a user wants to have watched: videos, folders, arrays, lists and iterators."""

import multiprocessing
import queue

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.data.media.open_source import open_source
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig
from videochat_flash_jax.testing.dummy import write_dummy_video

SIZE = 16
TINY = SamplingConfig(min_frames=4, max_frames=12, local_frames=4)
ARRAY = np.random.default_rng(0).integers(0, 256, (6, 10, 14, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
  """24 frames at 2 fps."""
  return write_dummy_video(tmp_path_factory.mktemp("video") / "match.mp4")


@pytest.fixture
def folder(tmp_path):
  """The frames of ARRAY, in the folder "shots"."""
  (tmp_path / "shots").mkdir()
  for number, picture in enumerate(ARRAY):
    Image.fromarray(picture).save(tmp_path / "shots" / f"{number}.png")
  return tmp_path / "shots"


def opened(source, **options):
  return open_source(source, sampling=TINY, **options)


def chosen(source, **options) -> list[int]:
  """The indices of the frames that are watched."""
  with opened(source, **options) as frames:
    return frames.indices.tolist()


def check_frames(source, pictures):
  """Compares the frames of a source with pictures of their own size."""
  with source:
    frames = list(source.frames(SIZE))
    np.testing.assert_array_equal(frames, [resize(picture, SIZE) for picture in pictures])
    assert len(source.times) == len(frames) == source.num_frames


def test_a_video_is_sampled_as_it_always_was(video):
  indices = inference_indices(24, 2.0, TINY)
  with opened(video) as source:
    np.testing.assert_array_equal(source.indices, indices)
    assert (source.name, source.path, source.seconds) == ("match.mp4", video, 12.0)
    assert source.times == (indices / 2).tolist()
    assert (source.num_frames, source.num_seen, source.damaged) == (12, 12, False)
    assert source.info == open_video(video).info
    with open_video(video) as reader:
      expected = reader.read(indices, SIZE)
    np.testing.assert_array_equal(list(source.frames(SIZE)), expected)


@pytest.mark.parametrize(
  "options, expected",
  [
    ({"max_frames": 3}, [3, 11, 19, 19]),
    ({"start": 5.2, "end": 7.1}, [10, 11, 12, 13]),
    ({"start": 10}, [20, 21, 22, 23]),
    ({"end": 99, "max_frames": 4}, [2, 8, 14, 20]),
    ({"fps": 2, "max_frames": 50}, list(range(24))),
    ({"fps": 2}, list(range(0, 24, 2))),  # the model's bound, 12
    ({"fps": 2, "start": 2, "end": 5}, [4, 5, 6, 7, 8, 9, 9, 9]),
    ({"fps": 1, "start": 2, "end": 5}, [4, 6, 8, 8]),
    ({"times": [0.7, 3, 11.9]}, [1, 6, 23, 23]),
    ({"times": (4, 5), "start": 4, "end": 5}, [8, 9, 9, 9]),
    ({"times": np.arange(24) / 2}, list(range(24))),  # the user's choice, above the model's bound
  ],
)
def test_the_frames_of_a_video_are_chosen_by_time_rate_and_number(video, options, expected):
  assert chosen(video, **options) == expected


def test_three_frames_are_seen_where_no_more_are_wanted_and_one_of_a_film_of_one(video, tmp_path):
  with opened(video, max_frames=3) as source:
    assert (source.num_frames, source.num_seen) == (4, 3)
  with opened(write_dummy_video(tmp_path / "one.mp4", num_frames=1)) as source:
    assert (source.num_frames, source.num_seen) == (4, 1)
    first, *others = source.frames(SIZE)
    assert all((frame == first).all() for frame in others)


def test_the_users_times_are_told(video):
  with opened(video, times=[0.7, 3.1]) as source:
    assert source.times == [0.7, 3.1, 3.1, 3.1]
    assert (source.seconds, source.num_seen) == (12.0, 2)


def test_a_part_of_a_video_tells_its_own_length_and_times_of_the_video(video):
  with opened(video, start=2.5, end=6, max_frames=4) as source:
    assert source.seconds == 3.5
    assert 2.5 <= source.times[0] < source.times[-1] < 6


def test_a_video_of_which_the_info_is_known_is_not_opened_before_a_frame_is_wanted(
  video, monkeypatch
):
  with open_video(video) as reader:
    info = reader.info
  calls = []

  def counted(path):
    calls.append(path)
    return open_video(path)

  monkeypatch.setattr("videochat_flash_jax.data.media.open_source.open_video", counted)
  with opened(video, known_info={video: info}.get) as source:
    assert source.indices.tolist() == inference_indices(24, 2.0, TINY).tolist()
    assert (source.info, source.seconds, source.damaged, calls) == (info, 12.0, False, [])
    assert len(list(source.frames(SIZE))) == 12
    assert calls == [video]
  with opened(video, known_info={}.get) as source:
    assert source.info == info and len(calls) == 2


def test_addresses_are_watched(video, folder, monkeypatch):
  fsspec.filesystem("memory").pipe_file("/watched/match.mp4", video.read_bytes())
  expected = chosen(video)
  with opened("memory://watched/match.mp4") as source:
    assert (source.name, source.indices.tolist()) == ("match.mp4", expected)
    assert len(list(source.frames(SIZE))) == 12
  spaced = video.with_name("a b%.mp4")
  spaced.write_bytes(video.read_bytes())
  for address in (spaced.as_uri(), f"file://{spaced}", f"file://localhost{video}"):
    assert chosen(address) == expected
  assert chosen(folder.as_uri()) == chosen(folder)
  monkeypatch.setenv("HOME", str(video.parent))
  assert chosen(f"~/{video.name}") == expected
  with pytest.raises(InputError, match="foo:// is an unknown protocol"):
    opened("foo://host/a.mp4")
  with pytest.raises(InputError, match="there is no such video"):
    opened("file:///no/such.mp4")


def test_what_is_no_video_is_refused_with_what_to_do(folder, tmp_path, video):
  (picture, *_), films = sorted(folder.iterdir()), tmp_path / "films"
  with pytest.raises(InputError, match=r"a picture, not a video; look at it by chat.look"):
    opened(picture)
  films.mkdir()
  films.joinpath("b.mp4").write_bytes(video.read_bytes())
  with pytest.raises(InputError, match=r"give one of its videos, such as b.mp4"):
    opened(films)


def test_a_folder_is_one_picture_a_second_or_as_the_user_says(folder):
  with opened(folder) as source:
    assert source.indices.tolist() == inference_indices(6, 1.0, TINY).tolist()
    assert (source.seconds, source.name, source.path) == (6.0, "shots", folder)
  with opened(folder, fps=3) as source:
    assert source.indices.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert (source.seconds, source.name, source.path) == (2.0, "shots", folder)
  check_frames(opened(folder, times=[0, 1, 2, 3, 4, 50], start=3), ARRAY[[3, 4, 5, 5]])


@pytest.mark.parametrize(
  "to_kind", [np.asarray, list, tuple, jnp.asarray], ids=["numpy", "list", "tuple", "jax"]
)
def test_arrays_and_lists_are_watched_as_they_are(to_kind):
  source = opened(to_kind(ARRAY), fps=2)
  assert (source.num_frames, source.num_seen, source.seconds) == (8, 6, 3.0)
  assert source.times == [0, 0.5, 1, 1.5, 2, 2.5, 2.5, 2.5]
  assert (source.path, source.info) == (None, None)
  check_frames(source, ARRAY[[0, 1, 2, 3, 4, 5, 5, 5]])


def test_a_list_takes_paths_images_and_arrays_of_any_size(folder):
  pictures = [folder / "0.png", str(folder / "1.png"), Image.fromarray(ARRAY[2]), ARRAY[3, :4]]
  check_frames(opened(pictures), [*ARRAY[:3], ARRAY[3, :4]])


@pytest.mark.parametrize(
  "options, expected, seconds",
  [
    ({}, [0, 1, 2, 3, 4, 5, 5, 5], 6),
    ({"max_frames": 6}, [0, 1, 2, 3, 4, 5, 5, 5], 6),
    ({"max_frames": 5}, [0, 1, 3, 4], 6),
    ({"max_frames": 2}, [1, 4, 4, 4], 6),
    ({"start": 3.5}, [3, 4, 5, 5], 2.5),
    ({"fps": 2, "start": 1, "end": 2}, [2, 3, 3, 3], 1),
    ({"times": [0, 1, 2, 3, 4, 9]}, [0, 1, 2, 3, 4, 5, 5, 5], 10.8),
    ({"times": [0, 1, 2, 3, 4, 9], "end": 2.5}, [0, 1, 2, 2], 2.5),
  ],
)
def test_the_frames_of_an_array_are_bounded_by_times_and_number(options, expected, seconds):
  with opened(ARRAY, **options) as source:
    assert source.indices.tolist() == expected
    assert source.seconds == pytest.approx(seconds)


def test_the_models_bound_counts_for_arrays():
  frames = np.zeros((50, 4, 4, 3), np.uint8)
  assert len(chosen(frames)) == 12
  assert len(chosen(frames, max_frames=48)) == 48


def test_a_single_frame_is_repeated():
  check_frames(opened(ARRAY[:1]), ARRAY[[0, 0, 0, 0]])
  with opened(ARRAY[:1], times=[3]) as source:
    assert (source.times, source.seconds, source.num_seen) == ([3, 3, 3, 3], 1.0, 1)


def test_an_iterator_is_bounded_by_time_and_number():
  with opened(iter(ARRAY), fps=2, start=1, end=2) as source:
    assert source.num_frames is None and source.indices is None
    frames = list(source.frames(SIZE))
  np.testing.assert_array_equal(frames, [resize(picture, SIZE) for picture in ARRAY[[2, 3, 3, 3]]])
  assert (source.num_seen, source.seconds, source.times) == (2, 1.0, [1, 1.5, 1.5, 1.5])


@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, multiprocessing.Queue])
def test_a_queue_is_watched_until_it_gives_none(kind):
  frames = kind()
  for frame in (*ARRAY[:4], None):
    frames.put(frame)
  with opened(frames, stall_seconds=30) as source:
    given = list(source.frames(SIZE))
  np.testing.assert_array_equal(given, [resize(picture, SIZE) for picture in ARRAY[:4]])
  assert source.num_frames == 4


def test_the_models_bound_counts_for_an_iterator_and_is_told(caplog):
  frames = iter(np.zeros((50, 4, 4, 3), np.uint8))
  assert len(list(opened(frames).frames(SIZE))) == 12
  assert "watched 12 frames" in caplog.text and len(list(frames)) == 38
  caplog.clear()
  assert len(list(opened(iter(ARRAY), max_frames=4).frames(SIZE))) == 4
  assert not caplog.records


@pytest.mark.parametrize(
  "options, message",
  [
    ({"start": -1}, "start is -1: give a number from 0"),
    ({"start": 5, "end": 5}, "end is 5: give a number above 5"),
    ({"end": 0}, "end is 0: give a number above 0"),
    ({"fps": 0}, "fps is 0: give a number above 0"),
    ({"fps": True}, "fps is True"),
    ({"max_frames": 0}, "max_frames is 0: give a positive integer"),
    ({"stall_seconds": 0}, "stall_seconds is 0: give"),
    ({"fps": 1, "times": [1]}, "fps and times are both given"),
    ({"times": []}, "times are no rising seconds"),
    ({"times": 3}, "times are no rising seconds"),
    ({"times": [1, 1]}, "times are no rising seconds"),
    ({"times": [2, 1]}, "times are no rising seconds"),
    ({"times": [-1, 1]}, "times are no rising seconds"),
    ({"times": [0, float("nan")]}, "times are no rising seconds"),
    ({"times": ["1"]}, "times are no rising seconds"),
    ({"times": [[1], [2, 3]]}, "times are no rising seconds"),
    ({"times": [1, 12.5]}, r"times\[1\] is 12.5: give seconds from 0 to 12"),
    ({"times": [1, 7], "end": 6}, r"times\[1\] is 7: give seconds from 0 to 6"),
    ({"times": [1, 2, 3], "max_frames": 2}, "times has 3 entries and max_frames is 2"),
    ({"start": 12}, "start is 12: the video ends at 12.00 s"),
  ],
)
def test_an_argument_that_does_not_fit_is_an_input_error(video, options, message):
  with pytest.raises(InputError, match=message):
    opened(video, **options)


@pytest.mark.parametrize(
  "source, options, message",
  [
    (3, {}, "type int cannot be watched; give a path"),
    (None, {}, "type NoneType cannot be watched"),
    (Image.new("RGB", (4, 4)), {}, "type Image cannot be watched"),
    ("", {}, "is not a path"),
    ("no/such.mp4", {}, "there is no such video"),
    ([], {}, "there is no frame"),
    (ARRAY[:0], {}, "there is no frame"),
    (ARRAY[0], {}, r"frames are uint8 \(10, 14, 3\); give uint8 \[frames"),
    (ARRAY / 255, {}, "frames are float64"),
    (ARRAY, {"times": [1, 2]}, "times has 2 entries for 6 frames"),
    (ARRAY, {"start": 6}, "start is 6: the video ends at 6.00 s"),
    (ARRAY, {"times": [2, 3, 4, 5, 6, 7], "end": 1}, "end is 1: the video begins at 2 s"),
    (iter(ARRAY), {"times": [1]}, "times cannot be given for an iterator"),
  ],
)
def test_a_source_that_cannot_be_watched_is_an_input_error(source, options, message):
  with pytest.raises(InputError, match=message):
    opened(source, **options)


def test_a_broken_picture_of_a_list_is_an_error_after_those_before_it():
  source, frames = opened([ARRAY[0], ARRAY[1], None, ARRAY[3]]), []
  with pytest.raises(InputError, match="frame 2 is of type NoneType"):
    frames.extend(source.frames(SIZE))
  assert len(frames) == 2
