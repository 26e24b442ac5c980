"""Annotation mixtures of the original, golden family 10; SPEC_sampling.md tells it in words.

Rows that pin a mended fault (annotations.py names them) are told apart by what they ask for.
"""

import re

import numpy as np
import pytest

from tests.conftest import number_written
from tests.parity.golden_mixtures import (
  FAMILY,
  refused,
  rows_of,
  touch_files,
  with_entry,
  without_entry,
)
from videochat_flash_jax.data.media.frame_sampling import clip_indices, training_indices
from videochat_flash_jax.data.mixture.annotations import (
  annotated_clip,
  check_media,
  deal_evenly,
  kept_rows,
  kind_of,
  length_in_words,
  media_length,
  num_clip_frames,
  picture_indices,
  with_full_paths,
)
from videochat_flash_jax.errors import InputError


def is_well_written(strategy):
  """Misspelt and incomplete strategies silently keep everything in the original."""
  return re.fullmatch(r"all|(first[234]?|end|random):.*", strategy)


def strategies(test):
  rows = [row for row in FAMILY["strategies"] if test(row)]
  assert rows
  return rows


def test_strategies_keep_the_same_rows():
  for row in strategies(lambda row: "ids" in row and is_well_written(row["strategy"])):
    assert list(kept_rows(row["dataset_size"], row["strategy"])) == row["ids"], row
  ids = FAMILY["default_strategy"]["ids"]
  assert [ids[number] for number in kept_rows(len(ids))] == ids


def test_what_the_original_refuses_is_refused_and_random_works():
  for row in strategies(lambda row: "error" in row):
    if not row["strategy"].startswith("random:"):
      with pytest.raises(InputError):
        kept_rows(row["dataset_size"], row["strategy"])
      continue
    number = re.search(r"\d+", row["strategy"])[0]
    size = row["dataset_size"]
    share = int(number) * size / 100 if "%" in row["strategy"] else int(number)
    assert len(kept_rows(size, row["strategy"])) == min(np.ceil(share), size)


def test_what_the_original_passes_over_is_refused():
  for row in strategies(lambda row: not is_well_written(row["strategy"])):
    with pytest.raises(InputError, match=re.escape(row["strategy"])):
      kept_rows(row["dataset_size"], row["strategy"])


@pytest.mark.parametrize("case", FAMILY["mixing"], ids=lambda case: case["name"])
def test_mixtures_have_the_same_rows_with_the_same_paths(case, tmp_path):
  def in_place(value):
    """The value with the stored root replaced by the test's own folder."""
    if isinstance(value, dict):
      return {key: in_place(part) for key, part in value.items()}
    if isinstance(value, list):
      return [in_place(part) for part in value]
    return value.replace("<ROOT>", str(tmp_path)) if isinstance(value, str) else value

  case = in_place(case)
  if "error" in case:
    touch_files(rows_of("video", range(6)), tmp_path / "media")
    for files in [with_entry(case)] if "entry" in case else refused(case, tmp_path):
      with pytest.raises(InputError):
        mix(files)
    return
  files = with_entry(case) if "entry" in case else without_entry(case)
  for rows, entry in files:
    folder = entry.get("data_root", "")
    if folder.startswith(str(tmp_path)):
      touch_files(rows, folder)
  rows = mix(files)
  assert [row["id"] for row in rows] == case["ids"]
  assert len(rows) == case["n"]
  assert rows[0] == case["first"]


def mix(files):
  mixed = []
  for rows, entry in files:
    numbers = kept_rows(len(rows), entry.get("sampling_strategy", "all"))
    media_type = entry.get("media_type") or kind_of(rows[0])
    options = media_type, entry.get("data_root") or "", entry.get("video_read_type")
    kept = [with_full_paths(rows[number], *options) for number in numbers]
    if media_type not in ("text", "mix") and options[2] != "fake":
      check_media(kept[:3])
    mixed += kept
  return mixed


@pytest.mark.parametrize("name", ["lengths", "lengths_early_mix"])
def test_lengths_agree(name):
  stored = FAMILY[name]
  assert stored["ids"]
  for length, words in zip(stored["lengths"], stored["modality_lengths"], strict=True):
    row = {"conversations": [{"value": "word " * (abs(words) - 1)}, {"value": "end"}]}
    assert length_in_words(row) == abs(words)
    is_text = length == abs(words)
    if not is_text:
      row["image" if length - abs(words) == 128 else "video"] = "a"
    assert length_in_words(row) + media_length(kind_of(row), stored["frames_upbound"]) == length
    assert (words < 0) == (is_text and not stored.get("early_mix_text", False))


def test_rows_are_dealt_into_the_same_even_chunks():
  assert FAMILY["sampler"]["split_to_even_chunks"]
  for row in FAMILY["sampler"]["split_to_even_chunks"]:
    indices = list(range(len(row["lengths"])))
    assert deal_evenly(indices, row["lengths"], row["num_chunks"]) == row["chunks"]


def num_sorted_at_the_end(row, size):
  """Where text and media mix, the last megabatch of each goes to the end, by index."""
  if row["kind"] != "mixed":
    return 0
  num_text = sum(length < 0 for length in row["lengths"])
  counts = num_text, len(row["lengths"]) - num_text
  return sum(count % size or min(count, size) for count in counts)


def test_megabatches_are_grouped_by_length_alike():
  assert {row["kind"] for row in FAMILY["sampler"]["rows"]} == {"all_positive", "mixed"}
  for row in FAMILY["sampler"]["rows"]:
    lengths = np.abs(row["lengths"])
    size = row["batch_size"] * row["world_size"]
    grouped = len(row["indices"]) - num_sorted_at_the_end(row, size)
    for start in range(0, grouped, size):
      megabatch = row["indices"][start : min(start + size, grouped)]
      longest_first = sorted(megabatch, key=lambda index: -lengths[index])
      groups = deal_evenly(longest_first, lengths, row["world_size"])
      dealt = [index for group in groups for index in group]
      # Only lengths are compared: rows of one length may change places.
      np.testing.assert_array_equal(lengths[dealt], lengths[megabatch])
    assert row["indices"][grouped:] == sorted(row["indices"][grouped:])


def test_clips_are_recognised_and_have_the_same_number_of_frames():
  rows = FAMILY["process_video_reader_arguments"]["rows"]
  with_clips = 0
  for row in rows:
    call, clip = row["call"], annotated_clip(row["annotation"])
    if call["reader"] != "lazy":  # the reader counts frames itself
      assert clip == (call["clip"] and tuple(call["clip"])), row
      continue
    assert clip == (call["video_start"], call["video_end"]), row
    num_frames = num_clip_frames(
      clip[1] - clip[0],
      row["sample_type"],
      min_frames=row["frames_lowbound"],
      max_frames=row["frames_upbound"],
      local_frames=row["local_num_frames"],
    )
    assert num_frames == call["num_frames"], row
    with_clips += 1
  assert with_clips


def bounds_of(row):
  return {
    "num_picks": row["num_frames"],
    "min_frames": row["min"],
    "max_frames": row["max"],
    "local_frames": row["local"],
  }


def test_frames_of_videos_agree():
  whole = [row for row in FAMILY["read_frames_decord"] if row["clip"] is None]
  assert whole  # of the others, clips, a run reads the frames tested last
  for row in whole:
    indices = training_indices(row["sample"], row["vlen"], row["fps"], **bounds_of(row))
    assert indices.tolist() == row["indices"], row


def test_pictures_of_folders_agree_but_for_the_first_picture():
  rows = FAMILY["read_frames_img"]["rows"]
  assert {row["clip"] is None for row in rows} == {True, False}
  for row in rows:
    if row["clip"] is None:  # whatever the folder's rate, pictures are counted as seconds
      indices = training_indices(row["sample"], row["n_files"], 1.0, **bounds_of(row))
    else:
      start, end = map(float, row["clip"])
      folder = row["sample"], row["n_files"], row["fps"]
      indices = picture_indices(*folder, start, end, **bounds_of(row))
      if round(start * row["fps"]) < 1:  # the original cannot read picture 0
        assert indices[0] == 0
        assert (indices[-1], len(indices)) == (row["files_read"][-1], len(row["files_read"]))
        continue
    assert indices.tolist() == row["files_read"], row


def test_frames_of_annotated_clips_agree_and_count_from_the_start_of_the_video():
  reader = FAMILY["clip_reader"]
  num_frames = number_written(r"container of (\d+) frames", reader["note"])
  assert reader["rows"]
  for row in reader["rows"]:
    clip = row["rate"], row["start"], row["end"]
    first = int(row["start"] * row["rate"])
    indices = clip_indices(num_frames, *clip, row["num_frames"])
    np.testing.assert_array_equal(indices - first, row["returned_indices"])
