"""Features on disk: exact, resumed after a kill, and never those of another encoder."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.data.media.video_files import pictures, write_video
from videochat_flash_jax.data.features.feature_key import (
  FeatureKey,
  file_digest,
  frames_entry,
  image_entry,
  weights_digest,
)
from videochat_flash_jax.data.features.feature_store import CLIPS_PER_FILE, FeatureStore
from videochat_flash_jax.data.media.video_reader import VideoInfo
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VisionConfig

ROOT = Path(__file__).parents[3]
VISION = VisionConfig(
  kind="umt", image_size=32, patch_size=8, width=8, depth=2, num_heads=2, mlp_width=24
)
KEY = FeatureKey(VISION, clip_tokens=4, merge_heads=2, dtype="bfloat16", weights="abc")


def name(number):
  return (number + 1).to_bytes(16, "little")


def clips(count, seed=0):
  """Every kind of bfloat16: normal, subnormal, infinite, not a number."""
  bits = np.random.default_rng(seed).integers(0, 1 << 16, (count, 4, 8), np.uint16)
  return bits.view(ml_dtypes.bfloat16)


def same(one, other):
  return one.dtype == other.dtype and np.array_equal(one.view(np.uint16), other.view(np.uint16))


def open_store(path, **changes):
  return FeatureStore.open(path, dataclasses.replace(KEY, **changes), create=True)


def fill(store, counts, first=0):
  with store.writing() as writer:
    for number, count in enumerate(counts, start=first):
      writer.put(name(number), clips(count, number))


def check(store, counts):
  assert len(store) == len(counts)
  for number, count in enumerate(counts):
    assert name(number) in store and same(store.get(name(number)), clips(count, number)), number


def test_entries_of_any_length_come_back_bit_by_bit_in_every_process(tmp_path):
  store, counts = open_store(tmp_path / "a"), [1, 200, 63, 1, 64, 5, 128]
  fill(store, counts)
  check(store, counts)
  check(pickle.loads(pickle.dumps(store)), counts)
  assert len(pickle.dumps(store)) < 2000
  assert store.get(name(99)) is None and name(99) not in store


def test_a_folder_may_have_any_name(tmp_path):
  for seed, path in enumerate(("a/b", "a\\b", "c d", "c%20d", "e", "e#?|", "f [1]")):
    store = open_store(tmp_path / path)
    fill(store, [2, 3], first=seed)
    assert (tmp_path / path / "clips").is_dir()
    assert same(store.get(name(seed)), clips(2, seed))


def test_clips_of_zeros_are_kept_and_lost_files_are_told(tmp_path):
  store = open_store(tmp_path)
  zeros = np.zeros((CLIPS_PER_FILE, 4, 8), ml_dtypes.bfloat16)
  with store.writing() as writer:
    writer.put(name(0), zeros)
    writer.put(name(1), clips(3))
  assert same(store.get(name(0)), zeros)
  (tmp_path / "clips/c/0/0/0").unlink()
  with pytest.raises(InputError, match="missing"):
    store.get(name(0))
  assert same(store.get(name(1)), clips(3))
  file = tmp_path / "clips/c/1/0/0"
  file.write_bytes(b"x" * 20 + file.read_bytes()[20:])
  with pytest.raises(InputError, match="delete the folder"):
    store.get(name(1))


def test_an_entry_that_fails_leaves_nothing_and_takes_nothing_with_it(tmp_path):
  store = open_store(tmp_path)

  def broken(count):
    yield from clips(count)
    raise InputError("the video ends early")

  with store.writing() as writer:
    writer.put(name(0), clips(10, 0))
    for count in (5, 54, 55, 300):
      with pytest.raises(InputError, match="ends early"):
        writer.put(name(7), broken(count))
    writer.put(name(1), clips(100, 1))
    with pytest.raises(TypeError, match="bfloat16"):
      writer.put(name(2), [np.zeros((4, 8), np.float32)])
    with pytest.raises(ValueError, match="already"):
      writer.put(name(1), clips(1))
    writer.put(name(2), clips(1, 2))
  check(store, [10, 100, 1])


def test_thousands_of_small_entries_take_seconds_and_few_files(tmp_path):
  start, store, count = time.perf_counter(), open_store(tmp_path), 4000
  data = clips(count)
  with store.writing() as writer:
    for number in range(count):
      writer.put(name(number), data[number : number + 1])
  store = open_store(tmp_path)
  for number in range(0, count, 7):
    assert same(store.get(name(number))[0], data[number])
  assert time.perf_counter() - start < 10
  assert sum(path.is_file() for path in tmp_path.rglob("*")) < 10 + count / CLIPS_PER_FILE


def test_a_million_entries_are_ready_in_a_moment(tmp_path):
  open_store(tmp_path)
  fields = ("digest", "<u8", (2,)), ("first", "<i8"), ("clips", "<i8"), ("is_damaged", "u1")
  records = np.zeros(1_000_000, list(fields))
  records["digest"] = np.random.default_rng(0).integers(1, 1 << 63, (len(records), 2))
  records["digest"][5, 0] = records["digest"][6, 0]  # half a digest is not enough
  records["clips"] = 1
  (tmp_path / "entries").write_bytes(records.tobytes())
  start, store = time.perf_counter(), open_store(tmp_path)
  assert len(store) == len(records)
  assert all(records["digest"][number].tobytes() in store for number in (0, 5, 6, 999_999))
  assert (records["digest"][5] + np.uint64(1)).tobytes() not in store
  assert time.perf_counter() - start < 3


@pytest.mark.parametrize("lost", [1, 16, 31])
def test_a_record_that_was_cut_short_does_not_count_and_is_written_over(tmp_path, lost):
  store = open_store(tmp_path)
  fill(store, [3, 70, 4])
  entries = tmp_path / "entries"
  entries.write_bytes(entries.read_bytes()[:-lost])
  check(open_store(tmp_path), [3, 70])
  fill(store, [4, 80], first=2)
  check(open_store(tmp_path), [3, 70, 4, 80])


def test_zeros_behind_the_records_do_not_count(tmp_path):
  store = open_store(tmp_path)
  fill(store, [3, 70])
  with open(tmp_path / "entries", "ab") as file:
    file.write(bytes(70))
  check(open_store(tmp_path), [3, 70])
  fill(store, [9], first=2)
  check(open_store(tmp_path), [3, 70, 9])


_WRITE_ON = """
import sys
from tests.data.features.feature_store_test import clips, name, open_store
store = open_store(sys.argv[1])
with store.writing() as writer:
  for number in range(100_000):
    if name(number) not in writer:
      writer.put(name(number), clips(1 + number % 40, number))
    print(number, flush=True)
"""


def test_killed_writers_lose_no_whole_file_and_others_go_on(tmp_path):
  store, known = open_store(tmp_path / "a"), 0
  for _ in range(3):
    process = subprocess.Popen(
      [sys.executable, "-c", _WRITE_ON, str(tmp_path / "a")],
      cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
      if int(line) >= known + 40:  # in the middle of something
        break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = open_store(tmp_path / "a")
    assert len(store) > known + 30
    known = len(store)
    check(store, [1 + number % 40 for number in range(known)])


def test_one_process_writes_at_a_time_and_the_others_are_told(tmp_path):
  one, other = open_store(tmp_path), open_store(tmp_path)
  assert len(other) == 0
  with one.writing() as writer:
    writer.put(name(0), clips(2, 0))
    with pytest.raises(InputError, match="another process writes"), other.writing():
      pass
  fill(other, [3], first=1)  # it has read again what the first one wrote
  check(other, [2, 3])
  fill(one, [1], first=2)
  check(one, [2, 3, 1])


def changed_key(field, value):
  if field in {f.name for f in dataclasses.fields(VisionConfig)}:
    return {"vision": dataclasses.replace(VISION, **{field: value})}
  return {field: value}


@pytest.mark.parametrize("field", list(KEY.facts()))
def test_another_key_is_refused_by_the_field_that_differs(tmp_path, field):
  open_store(tmp_path)
  old = KEY.facts()[field]
  new = "other" if isinstance(old, str) else old + 1
  said = rf"{field} is {old!r} there, here it is {new!r}; give another folder"
  with pytest.raises(InputError, match=said):
    open_store(tmp_path, **changed_key(field, new))
  assert dataclasses.replace(KEY, **changed_key(field, new)).digest != KEY.digest


def test_a_later_format_other_folders_and_files_are_refused(tmp_path):
  with pytest.raises(InputError, match="no features; make them with vcflash data encode"):
    FeatureStore.open(tmp_path / "none", KEY)
  open_store(tmp_path / "a")
  key = tmp_path / "a" / "key.json"
  key.write_text(json.dumps(json.loads(key.read_text()) | {"format": 3}))
  with pytest.raises(InputError, match="format is 3 there, here it is 2"):
    open_store(tmp_path / "a")
  for text in ("[1]", "{", ""):
    key.write_text(text)
    with pytest.raises(InputError, match="not a key"):
      open_store(tmp_path / "a")
  (tmp_path / "b").write_text("a file")
  with pytest.raises(InputError, match="cannot be used"):
    open_store(tmp_path / "b")
  (tmp_path / "c").mkdir()
  (tmp_path / "c" / "thesis.txt").write_text("mine")
  with pytest.raises(InputError, match="other files"):
    open_store(tmp_path / "c")
  assert os.listdir(tmp_path / "c") == ["thesis.txt"]


def test_weights_are_the_same_in_either_dtype_and_differ_by_name_shape_and_value():
  values = np.arange(6, dtype=np.float32).reshape(2, 3)
  digest = weights_digest([("a", values), ("b", values)])
  half = values.astype(ml_dtypes.bfloat16)
  assert weights_digest([("a", half), ("b", half)]) == digest
  for others in (
    [("a", values), ("c", values)],
    [("a", values), ("b", values.T)],
    [("a", values), ("b", values + 1)],
    [("a", values)],
    [("a", values), ("b", values.reshape(3, 2))],
  ):
    assert weights_digest(others) != digest


def test_a_video_is_known_by_its_content_and_its_frames(tmp_path):
  a, b, c = (tmp_path / file for file in ("a.mp4", "b.mp4", "c.mp4"))
  write_video(a, pictures(8))
  b.write_bytes(a.read_bytes())
  write_video(c, pictures(9))
  assert frames_entry(a, [0, 4]) == frames_entry(str(b), np.array([0, 4]))
  names = {frames_entry(a, [0, 4]), frames_entry(a, [0, 5]), frames_entry(a, [0])}
  assert len({*names, frames_entry(c, [0, 4])}) == 4
  before = file_digest(a)
  a.write_bytes(a.read_bytes()[:-1] + b"\0")
  assert file_digest(a) != before
  large = tmp_path / "large"
  for place in (0, 2_999_999):
    data = bytearray(3_000_000)
    large.write_bytes(data)
    before = file_digest(large)
    data[place] = 1
    large.write_bytes(data)
    os.utime(large, ns=(place, place))
    assert file_digest(large) != before


def test_an_image_is_known_by_its_pixels_and_its_tiles():
  image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  names = [image_entry(image, tiles) for tiles in (None, (1, 2), (2, 1))]
  names += [image_entry(image.reshape(6, 4, 3), None), image_entry(image + 1, None)]
  assert len(set(names)) == 5
  assert image_entry(image.copy(), (1, 2)) == names[1]


def test_facts_of_a_video_are_known_again_wherever_it_lies(tmp_path):
  store, info = open_store(tmp_path / "store"), VideoInfo(8, 30000 / 1001, 0.1 + 0.2, 32, 48)
  (tmp_path / "a.mp4").write_bytes(b"some video")
  (tmp_path / "b.mp4").write_bytes(b"some video")
  with store.writing() as writer:
    for _ in range(2):
      writer.put_video(tmp_path / "a.mp4", info)
  store = open_store(tmp_path / "store")
  assert store.video_info(str(tmp_path / "b.mp4")) == info
  for unknown in (tmp_path, tmp_path / "c.mp4", None, "a\0b"):
    assert store.video_info(unknown) is None
