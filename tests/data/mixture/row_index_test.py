"""Annotation files of any form and size become rows, at once and in little memory."""

import itertools
import json
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.mixture.annotation_rows import open_all, row, write_jsonl
from videochat_flash_jax.data.mixture import row_index, row_text
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

FORMS = {
  "lines": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
  "lines with blank ones": lambda rows: "\n\n".join(map(json.dumps, rows)) + "\r\n \n",
  "list": json.dumps,
  "list, indented": lambda rows: " \n" + json.dumps(rows, indent=3, ensure_ascii=False),
  "list after a byte order mark": lambda rows: "\ufeff" + json.dumps(rows, ensure_ascii=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_list_and_lines_are_told_by_their_content(tmp_path, monkeypatch, form, suffix):
  monkeypatch.setattr(row_text, "_PIECE_BYTES", 100)  # rows are longer than a piece, or shorter
  expected = [row(i, "text", more="ü" * (7 * i)) for i in range(20)]
  path = tmp_path / f"a{suffix}"
  path.write_text(FORMS[form](expected))
  rows = open_all(path)
  assert [rows[i] for i in range(len(rows))] == expected


@pytest.mark.parametrize(
  "text, said",
  [
    ('[{"id": 1}, {"id": 2', "broken JSON at byte 20, after 1 rows"),
    ('[{"id": 1} {"id": 2}]', "broken JSON at byte 11, after 0 rows"),
    ('[{"id": 1}, {"id": 2 ' + '"x": 3}' + " " * 1000, "after 1 rows"),
    ('[{"id": 1}, ' + "[" * 100_000, "after 1 rows"),
    ("[]", "holds no row"),
    ("", "holds no row"),
    ("no JSON\nat all\n", "holds no row"),
    ("[1, 2]", "holds no row"),
    ('{"id": 1, "id": 2}', "holds no row .row 1: key 'id' stands twice"),
    ('{"id": "\udce9"}', "holds no row .row 1: not valid UTF-8"),
    (
      '[{"id": 1}][{"id": 2}]',
      "follows the list of rows, which ends at byte 11; give only one list",
    ),
    ('[\n{"id": 1}\n]\n[{"id": 2}]\n', "follows the list of rows, which ends at byte 13"),
    ('[{"id": 1}] junk', "follows the list"),
    ("[\n]" + " " * 3_000_000 + "x", "follows the list"),
    ('[{"id": 1}]\n[{"id": 2}]\n', "holds no row"),
  ],
)
def test_a_file_without_rows_is_refused(tmp_path, text, said):
  path = tmp_path / "a.json"
  path.write_text(text, errors="surrogateescape")
  with pytest.raises(InputError, match=said) as error:
    open_all(path)
  assert str(path) in str(error.value)


def test_a_first_line_that_is_a_list_is_a_broken_row_among_others(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("\n" + json.dumps(["0.mp4"]) + "\n" + json.dumps(row(1, "text")) + "\n")
  rows = open_all(path)
  assert (len(rows), rows[1]["id"]) == (2, 1)
  with pytest.raises(BrokenRow, match=r"^bad json"):
    rows[0]


def test_a_number_of_thousands_of_digits_breaks_its_row_only(tmp_path):
  path = tmp_path / "a.json"
  path.write_text(json.dumps([row(0, "text"), {"id": "BIG"}]).replace('"BIG"', "9" * 5000))
  rows = open_all(path)
  assert rows[0]["id"] == 0
  with pytest.raises(BrokenRow, match=r"^bad json"):
    rows[1]


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize(
  "broken, said",
  [
    (b'{"id": 1, "video": "a.mp4", "video": "b.mp4"}', "key 'video' stands twice; remove one"),
    (b'{"id": 1, "x": [{"a": {"b": 1, "c": [], "b": 1}}]}', "key 'b' stands twice"),
    (b'{"id": 1, "caf\xc3\xa9": 1, "caf\xc3\xa9": 1}', "key 'caf\xe9' stands twice"),
    (b'{"id": 1, "video": "caf\xe9.mp4"}', "not valid UTF-8; save the file as UTF-8"),
    (b'{"id": 1, "video": "\xed\xa0\xbd"}', "not valid UTF-8"),
    (b"7", "not a JSON object"),
  ],
)
def test_a_row_that_is_no_json_says_why(tmp_path, monkeypatch, form, broken, said):
  monkeypatch.setattr(row_text, "_PIECE_BYTES", 40)  # a key stands twice before a piece's end
  parts = [json.dumps(row(0, "text")).encode(), broken, json.dumps(row(2, "text")).encode()]
  path = tmp_path / "a.json"
  path.write_bytes(b"[%s]" % b",\n".join(parts) if form == "list" else b"\n".join(parts))
  rows = open_all(path)
  assert (len(rows), rows[0]["id"], rows[2]["id"]) == (3, 0, 2)
  with pytest.raises(BrokenRow, match=rf"^bad json: .*a\.json row 2: {said}"):
    rows[1]
  assert rows.kind(1) == "text" and rows.label(1) == "row 2"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_file_in_utf_16_is_refused_by_name(tmp_path, encoding, form):
  mark = "" if encoding == "utf-16" else "\ufeff"
  path = tmp_path / "a.json"
  path.write_text(mark + FORMS[form]([row(0, "text")]), encoding)
  with pytest.raises(InputError, match=r"a\.json: the text is UTF-16; save it as UTF-8"):
    open_all(path)


def test_files_with_byte_order_marks_may_be_joined(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(f"\ufeff{json.dumps(row(i, 'text'))}\n" for i in range(3)))
  rows = open_all(path)
  assert [rows[i]["id"] for i in range(3)] == [0, 1, 2]


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"cannot be read .No such file"):
    open_all(tmp_path / "a.json")
  (tmp_path / "b.json").mkdir()
  with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
    open_all(tmp_path / "b.json")


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
  (tmp_path / "cache").write_text("a file")
  with pytest.raises(InputError, match=r"cannot be written .* VCF_CACHE_DIR"):
    open_all(path)


@pytest.mark.parametrize("name", ["facts.json", "rows.npy"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_index_is_made_again(tmp_path, name, kept):
  path = write_jsonl(tmp_path / "a.jsonl", [row(i, "text") for i in range(50)])
  open_all(path)
  (file,) = (tmp_path / "cache").glob(f"*/{name}")
  data = file.read_bytes()
  file.write_bytes(data[: int(kept * len(data))])
  assert open_all(path)[49]["id"] == 49
  assert file.read_bytes() == data


def test_an_index_that_may_not_be_read_is_told_in_a_line(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
  open_all(path)
  (file,) = (tmp_path / "cache").glob("*/facts.json")
  file.unlink()
  file.mkdir()
  with pytest.raises(InputError, match=r"facts\.json: cannot be .* VCF_CACHE_DIR"):
    open_all(path)


def test_an_index_is_whole_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
  open_all(write_jsonl(tmp_path / "a.jsonl", [row(0)]))
  (directory,) = (tmp_path / "cache").iterdir()
  assert set(synced) == {path.stat().st_ino for path in (directory, *directory.iterdir())}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
  path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
  make = row_index._make_index

  def make_while_another_writes(json_path, directory):
    facts = make(json_path, directory)
    with open(path, "a") as file:
      file.write(json.dumps(row(1)))
    return facts

  monkeypatch.setattr(row_index, "_make_index", make_while_another_writes)
  with pytest.raises(InputError, match="changes while it is read; start again"):
    open_all(path)


def test_processes_that_build_at_once_get_the_same_index(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(3000)])
  found, barrier = [], threading.Barrier(4)

  def build():
    barrier.wait()
    found.append(open_all(path))

  threads = [threading.Thread(target=build) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [rows[2999]["id"] for rows in found] == [2999] * 4
  assert len(os.listdir(tmp_path / "cache")) == 1


def grown_megabytes(pickled, indices, answers):
  """Reads rows in another process and tells by how much its memory has grown."""

  def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

  before = resident()
  rows = pickle.loads(pickled)
  for index in indices:
    assert rows[index]["id"] == index
    assert len(rows.draw_of_kind("video", 5, np.random.default_rng(index))) == 5
  assert len(rows.lengths) == len(rows)
  answers.put(resident() - before)


def assert_ready_and_small(folder, num_rows, most_seconds, most_megabytes):
  text = json.dumps(row("NUMBER"), ensure_ascii=False) + "\n"
  before, after = text.split('"NUMBER"')
  path = folder / "many.jsonl"
  with open(path, "w") as file:
    file.writelines(f"{before}{i}{after.replace('NUMBER', str(i))}" for i in range(num_rows))
  open_all(path)
  start = time.perf_counter()
  rows = open_all(path)
  assert time.perf_counter() - start < most_seconds
  assert len(rows) == num_rows
  pickled = pickle.dumps(rows)
  assert len(pickled) < 4096
  context = multiprocessing.get_context("spawn")
  answers = context.Queue()
  indices = list(itertools.islice(range(0, num_rows - 1, max(1, num_rows // 200)), 200))
  worker = context.Process(target=grown_megabytes, args=(pickled, indices, answers))
  worker.start()
  grown = answers.get(timeout=60)
  worker.join()
  print(f"{num_rows:,} rows: a worker grew by {grown:.1f} MB")
  assert grown < most_megabytes


def test_many_rows_are_ready_at_once_and_cost_little_memory(tmp_path):
  assert_ready_and_small(tmp_path, 50_000, most_seconds=1, most_megabytes=40)


@pytest.mark.slow
def test_a_million_rows_are_ready_at_once_and_cost_little_memory(tmp_path):
  assert_ready_and_small(tmp_path, 1_000_000, most_seconds=20, most_megabytes=200)
