"""Rules of annotation mixtures; the official results are in tests/parity/sampling_test.py."""

import numpy as np
import pytest

from videochat_flash_jax.data.mixture.annotations import (
  annotated_clip,
  check_media,
  deal_evenly,
  has_half_clip,
  kept_rows,
  num_clip_frames,
  picture_indices,
  with_full_paths,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

BOUNDS = {"num_picks": 4, "min_frames": 1, "max_frames": 8, "local_frames": 4}


@pytest.mark.parametrize(
  "strategy, expected",
  [
    ("all", [0, 1, 2, 3, 4, 5, 6]),
    ("first:3", [0, 1, 2]),
    ("first3:2", [4, 5]),
    ("first4:2", [6]),
    ("end:25%", [5, 6]),
    ("first: 2 ", [0, 1]),
    ("first: 25 %", [0, 1]),
    ("first:1000%", [0, 1, 2, 3, 4, 5, 6]),
    ("first:-2", [0, 1, 2, 3, 4]),
    ("end:0", [0, 1, 2, 3, 4, 5, 6]),
    ("random:100", [0, 1, 2, 3, 4, 5, 6]),
  ],
)
def test_a_strategy_keeps_its_rows(strategy, expected):
  assert list(kept_rows(7, strategy)) == expected


def test_random_rows_differ_by_seed_and_keep_their_order():
  first, again, other = (kept_rows(1000, "random:5%", seed).tolist() for seed in (1, 1, 2))
  assert len(first) == len(set(first)) == 50
  assert first == again == sorted(first)
  assert first != other


@pytest.mark.parametrize(
  "strategy, said",
  [
    ("frist:3", "did you mean first"),
    ("FIRST:3", "did you mean first"),
    ("ends:3", "did you mean end"),
    ("nonsense", "use one of all, first"),
    ("", "use one of all, first"),
    ("first", "write 'all', or 'first:100'"),
    ("all:3", "write 'all'"),
    ("first:", "'' is not a whole number"),
    ("first:2.5%", "'2.5%' is not a whole number"),
    ("first:2:3", "'2:3' is not a whole number"),
    (f"first:{'9' * 5000}", "is not a whole number"),
    ("first:0", "keeps no row of 7"),
    ("first2:7", "keeps no row of 7"),
    ("random:0", "keeps no row of 7"),
    ("random:-1", "keeps no row of 7"),
  ],
)
def test_an_unusable_strategy_is_refused(strategy, said):
  with pytest.raises(InputError, match=said):
    kept_rows(7, strategy)


def test_an_empty_file_is_refused():
  with pytest.raises(InputError, match="no row of 0"):
    kept_rows(0)


def test_paths_are_joined_in_new_rows():
  row = {"image": "a.png"}
  assert with_full_paths(row, "image", "root") == {"image": "root/a.png"}
  assert row == {"image": "a.png"}
  listed = with_full_paths({"image": ["b.png", "c/d.png"]}, "image", "root")
  assert listed == {"image": ["root/b.png", "root/c/d.png"]}
  assert with_full_paths({"video": "a.mp4"}, "video", "gs://bucket/r", "img") == {
    "video": "gs://bucket/r/a.mp4",
    "video_read_type": "img",
  }


@pytest.mark.parametrize("media_type", ["text", "mix"])
def test_paths_of_text_and_mixed_files_are_left_alone(media_type):
  assert with_full_paths({"image": "a.png"}, media_type, "root") == {"image": "a.png"}


@pytest.mark.parametrize(
  "row, said",
  [
    ({"video": "b"}, "no field 'image'"),
    ({"image": None}, "no field 'image'"),
    ({"imgae": "a.png"}, "field 'imgae': did you mean 'image'"),
    ({"image": 3}, "field 'image' is 3"),
    ({"image": []}, r"field 'image' is \[\]"),
    ({"image": ["a", None]}, "field 'image'"),
    ({"image": "a\0b"}, "field 'image'"),
  ],
)
def test_rows_without_their_medium_are_refused(row, said):
  with pytest.raises(BrokenRow, match=f"^bad media field: {said}"):
    with_full_paths(row, "image")


@pytest.mark.parametrize("root", ["root", "/media/root", "gs://bucket/root"])
@pytest.mark.parametrize(
  "path",
  [
    "../a",
    "b/../../a",
    "..",
    "/etc/passwd",
    "gs://other/a",
    "gs://bucket/rooter/a",
    "gs://bucket/root/../a",
    "gs://bucket/root/%2e%2e/a",
    "/media/root/../a",
    "/media/rooter/a",
  ],
)
def test_paths_that_lead_out_of_their_folder_are_refused(root, path):
  with pytest.raises(BrokenRow, match=r"^outside data_root"):
    with_full_paths({"video": path}, "video", root)
  assert with_full_paths({"video": path}, "video", root, confined=False)["video"]
  assert with_full_paths({"video": path}, "video") == {"video": path}


def test_paths_within_their_folder_may_look_odd():
  for path in ("..a/b.mp4", "b/../a.mp4", "a b/ü:1.mp4", "./a.mp4"):
    assert with_full_paths({"video": path}, "video", "root") == {"video": f"root/{path}"}
  for path in ("/data/root/a.mp4", "/data/./root//b/../a.mp4"):
    assert with_full_paths({"video": path}, "video", "/data/x/../root/") == {"video": path}
  address = "gs://bucket/root/a.mp4"
  assert with_full_paths({"video": address}, "video", "gs://bucket/root/") == {"video": address}


def test_one_of_the_files_has_to_exist(tmp_path):
  (tmp_path / "c").touch()
  rows = [{"video": str(tmp_path / name)} for name in "abcd"]
  check_media(rows)
  check_media([{"image": [str(tmp_path / "c")]}])
  check_media([{}])
  with pytest.raises(InputError, match="correct data_root"):
    check_media(rows[:2])
  with pytest.raises(InputError, match="correct data_root"):
    check_media([rows[0], rows[1], rows[3]])


def test_a_clip_needs_start_and_end():
  assert annotated_clip({"start": 2, "end": "10.5"}) == (2.0, 10.5)
  assert annotated_clip({"start": 2}) is annotated_clip({"end": 2, "start": None}) is None
  halves = [{}, {"start": 2}, {"end": 2, "start": None}, {"start": 0, "end": 2}]
  assert [has_half_clip(row) for row in halves] == [False, True, True, False]


@pytest.mark.parametrize(
  "times",
  [(10**400, 3), (3, 10**400), ("a", 3), (3, 3), (5, 3), ([1], 2), (0, "nan"), (0, float("inf"))],
)
def test_times_that_are_no_clip_are_refused(times):
  with pytest.raises(InputError, match="fields 'start' and 'end'"):
    annotated_clip({"start": times[0], "end": times[1]})


@pytest.mark.parametrize("start, end", [(20.0, 30.0), (5.0, 5.01), (9.95, 12.0)])
def test_a_clip_without_a_frame_is_refused(start, end):
  with pytest.raises(InputError, match=r"holds no frame of a video of 10\.00 s"):
    picture_indices("dynamic_fps1", 100, 10.0, start, end, **BOUNDS)


def test_a_clip_of_a_folder_may_begin_with_its_first_picture():
  assert picture_indices("middle", 10, 1.0, 0.0, 9.0, **BOUNDS).tolist() == [0, 3, 6, 9]


def test_a_clip_has_one_frame_a_second_or_the_most():
  bounds = {"min_frames": 4, "max_frames": 16, "local_frames": 4}
  assert [num_clip_frames(seconds, "dynamic_fps1", **bounds) for seconds in (1, 9.9, 99)] == [
    4, 8, 16,
  ]  # fmt: skip
  assert num_clip_frames(1, "middle", **bounds) == 16


def test_rows_are_dealt_to_the_shortest_group():
  assert deal_evenly(range(6), [9, 8, 5, 4, 2, 1], 2) == [[0, 3, 4], [1, 2, 5]]
  assert deal_evenly(range(5), np.ones(5), 2) == [[0, 2, 4], [1, 3]]
  assert deal_evenly([], [], 2) == [[], []]
