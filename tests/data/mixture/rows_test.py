"""Rows of a mixture, read one at a time from files of any size."""

import json
import pickle

import numpy as np
import pytest

from tests.data.mixture.annotation_rows import open_all, row, write_jsonl
from tests.data.mixture.mutations import turns, write_mutated_mixture
from videochat_flash_jax.data.mixture import rows as rows_module
from videochat_flash_jax.data.mixture.annotations import length_in_words, media_length
from videochat_flash_jax.data.mixture.broken import REASONS, BrokenRow, because
from videochat_flash_jax.errors import InputError


def write_mixture(folder, files, **common):
  """A mixture of files, each given as (name, rows, fields of its entry)."""
  for name, rows, _ in files:
    write_jsonl(folder / name, rows)
  entries = [{"json_path": name, **common, **fields} for name, _, fields in files]
  (folder / "mixture.yaml").write_text(json.dumps({"datasets": entries}))
  return folder / "mixture.yaml"


def numbers(rows):
  return [rows[index]["id"] for index in range(len(rows))]


def test_sources_follow_one_another_each_by_its_strategy(tmp_path):
  files = [
    ("a.jsonl", [row(i) for i in range(6)], {"sampling_strategy": "first:3"}),
    ("b.jsonl", [row(100 + i, "image") for i in range(6)], {"sampling_strategy": "end:2"}),
    ("c.jsonl", [row(200 + i, "text") for i in range(3)], {"weight": 2.5}),
    ("d.jsonl", [row(300 + i) for i in range(50)], {"sampling_strategy": "random:5", "seed": 1}),
  ]
  rows = open_all(write_mixture(tmp_path, files))
  ids = numbers(rows)
  assert ids[:8] == [0, 1, 2, 104, 105, 200, 201, 202]
  assert len(rows) == 13 == len(set(ids))
  assert ids[8:] == sorted(ids[8:])
  assert rows.source_ranges == [(0, 3), (3, 5), (5, 8), (8, 13)]
  assert rows.weights == [1.0, 1.0, 2.5, 1.0]
  assert rows.source(4) == str(tmp_path / "b.jsonl")
  assert [rows.kind(i) for i in (0, 3, 5, 12)] == ["video", "image", "text", "video"]
  assert rows[3]["image"] == str(tmp_path / "104.x")
  assert [rows.label(i) for i in (0, 5)] == ["0", "200"]
  with pytest.raises(IndexError):
    rows[13]
  with pytest.raises(IndexError):
    rows[-1]


def test_lengths_are_the_estimated_ones(tmp_path):
  files = [
    ("a.jsonl", [row(i) for i in range(6)], {"sampling_strategy": "first2:2"}),
    ("b.jsonl", [row(1, "image"), row(2, "text"), row(3)], {"media_type": "mix"}),
  ]
  rows = open_all(write_mixture(tmp_path, files), max_frames=10)
  assert rows.lengths.dtype == np.int32
  assert rows.lengths.tolist() == [
    length_in_words(rows[i]) + media_length(rows.kind(i), 10) for i in range(5)
  ]


def test_mixed_files_have_rows_of_each_kind(tmp_path):
  files = [("a.jsonl", [row(1, "image"), row(2, "text"), row(3)], {"media_type": "mix"})]
  rows = open_all(write_mixture(tmp_path, files))
  assert [rows.kind(i) for i in range(3)] == ["image", "text", "video"]
  assert rows[2]["video"] == str(tmp_path / "3.x")


def test_rows_of_a_kind_are_drawn_from_all_sources(tmp_path):
  kinds = "video", "image", "text", "video"
  files = [
    ("a.jsonl", [row(i, kind) for i, kind in enumerate(kinds)], {"media_type": "mix"}),
    ("b.jsonl", [row(i, "image") for i in range(2)], {}),
  ]
  rows = open_all(write_mixture(tmp_path, files))

  def drawn(kind, most, seed=0):
    return rows.draw_of_kind(kind, most, np.random.default_rng(seed))

  assert {kind: sorted(drawn(kind, 9)) for kind in kinds} == {
    "video": [0, 3],
    "image": [1, 4, 5],
    "text": [2],
  }
  assert drawn("image", 2) == drawn("image", 2) and len(drawn("image", 2)) == 2
  assert {tuple(drawn("image", 2, seed)) for seed in range(99)} == {
    (1, 4), (4, 1), (1, 5), (5, 1), (4, 5), (5, 4),
  }  # fmt: skip


def test_every_broken_row_says_why_and_every_healthy_one_is_read(tmp_path):
  mixture = write_mutated_mixture(tmp_path, 66, 8, 40, seed=3)
  found_with_the_medium = {"unreadable video", "no frames", "missing file"}
  rows, found, read = open_all(mixture.path), {}, []
  for index in range(len(rows)):
    try:
      rows[index]
      read.append(rows.label(index))
    except BrokenRow as error:
      found[rows.label(index)] = error.reason
      message = str(error)
    else:
      continue
    assert message.startswith(f"{found[rows.label(index)]}: {rows.source(index)} row ")
    assert "\n" not in message
  assert set(mixture.healthy) <= set(read)
  assert found.items() <= mixture.expected.items()
  assert set(found.values()) == set(mixture.expected.values()) - found_with_the_medium
  missed = {label: mixture.expected[label] for label in mixture.expected.keys() - found.keys()}
  assert all(
    reason in found_with_the_medium or label.startswith("beyond the end")
    for label, reason in missed.items()
  )


@pytest.mark.parametrize(
  "fields, reason",
  [
    ({"image": "a.png"}, "bad media field"),
    ({"video_read_type": "imgs"}, "bad media field"),
    ({"video": ["a.mp4", 3]}, "bad media field"),
    ({"start": 3, "end": float("nan")}, "bad times"),
    ({"start": int("9" * 400), "end": 5}, "bad times"),
    ({"conversations": [{"from": "gpt", "value": "<image>"}]}, "bad conversations"),
    ({"conversations": turns("<image>?", " \n", "Well?", "")}, "bad conversations"),
    ({"conversations": turns("<image>?", "half an emoji \ud83d")}, "bad conversations"),
    ({"conversations": turns("caf\udce9 <image>?", "!")}, "bad conversations"),
    ({"conversations": turns("What?", "<image>")}, "bad conversations"),
  ],
)
def test_a_row_is_checked_when_it_is_read(tmp_path, fields, reason):
  rows = open_all(write_jsonl(tmp_path / "a.jsonl", [row(0), row(1, **fields)]))
  with pytest.raises(BrokenRow) as error:
    rows[1]
  assert error.value.reason == reason
  assert rows[0]["id"] == 0


def test_another_file_of_the_same_name_has_another_index(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(3)])
  before = open_all(path)
  left_open = pickle.loads(pickle.dumps(before))
  write_jsonl(path, [row(i) for i in range(10, 15)])
  assert numbers(open_all(path)) == [10, 11, 12, 13, 14]
  with pytest.raises(InputError, match="has changed since"):
    left_open[0]


def test_a_file_rewritten_while_it_is_open_is_no_file_of_broken_rows(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(50)])
  rows = open_all(path)
  assert rows[0]["id"] == 0
  with open(path, "r+") as file:  # in place: whoever has it open reads other bytes
    file.write("{}\n" * (path.stat().st_size // 3))
  with pytest.raises(InputError, match="has changed since") as error:
    rows[20]
  assert not isinstance(error.value, BrokenRow)


def test_a_file_that_is_gone_stops_the_run_and_its_rows_still_have_names(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(3)])
  rows = open_all(path)
  path.unlink()
  with pytest.raises(InputError, match=r"a\.jsonl: can no longer be read .*; restore it") as error:
    rows[1]
  assert not isinstance(error.value, BrokenRow)
  assert rows.label(1) == "row 2"


def test_a_file_replaced_while_it_is_open_is_read_on(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(0), row(1, conversations=3), []])
  rows = open_all(path)
  assert rows[0]["id"] == 0
  path.unlink()
  write_jsonl(path, [row(7)])
  for index, reason in ((1, "bad conversations"), (2, "bad json")):
    with pytest.raises(BrokenRow, match=f"^{reason}"):
      rows[index]


def test_the_fingerprint_is_that_of_the_rows_and_settings_not_of_the_place(tmp_path):
  def fingerprint(folder, number=0, **fields):
    (tmp_path / folder).mkdir()
    return open_all(
      write_mixture(tmp_path / folder, [("a.jsonl", [row(number)], fields)])
    ).fingerprint

  first = fingerprint("one")
  assert fingerprint("two", data_root="elsewhere") == first
  others = fingerprint("three", number=1), fingerprint("four", weight=2.0)
  assert len({first, *others}) == 3
  path = tmp_path / "one" / "mixture.yaml"
  assert len({open_all(path, max_frames=frames).fingerprint for frames in (64, 512, 512)}) == 2


def test_the_fingerprint_tells_which_rows_a_random_choice_keeps(tmp_path, monkeypatch):
  files = [("a.jsonl", [row(i) for i in range(50)], {"sampling_strategy": "random:5"})]
  path = write_mixture(tmp_path, files)
  before = open_all(path).fingerprint
  kept = rows_module.kept_rows
  monkeypatch.setattr(rows_module, "kept_rows", lambda *args: (kept(*args) + 1) % 50)
  assert open_all(path).fingerprint != before


def test_a_broken_row_crosses_processes():
  again = pickle.loads(pickle.dumps(BrokenRow("bad times", "row 3")))
  assert (str(again), again.reason) == ("bad times: row 3", "bad times")
  with pytest.raises(ValueError, match="none of"):
    BrokenRow("bad", "row 3")


def test_what_is_inside_breaks_the_row_for_a_reason():
  def reason_of(error, cause=None):
    with pytest.raises(BrokenRow) as caught, because("no frames"):
      raise error from cause
    return caught.value.reason

  assert "no frames" in REASONS
  assert reason_of(InputError("empty")) == reason_of(InputError("a"), OSError()) == "no frames"
  assert reason_of(InputError("empty"), FileNotFoundError()) == "missing file"
  assert reason_of(FileNotFoundError("none")) == "missing file"
  assert reason_of(BrokenRow("bad times", "row")) == "bad times"
  with pytest.raises(TimeoutError), because("no frames"):
    raise TimeoutError
