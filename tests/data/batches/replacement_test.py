"""What stands in for rows that cannot be read: neighbours about one film, and odd names."""

import json
import logging

import pytest

from tests.data.batches.broken_share_test import reader_of
from tests.data.batches.small_mixture import read_rows
from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.mutations import turns
from videochat_flash_jax.data.batches.broken_share import BrokenShare


@pytest.fixture
def one_bad_film(tmp_path):
  """A thousand rows; 150 that follow one another are about one file, which is no video."""
  write_video(tmp_path / "a.mp4", pictures(8, 32, 32), fps=4)
  (tmp_path / "film.mp4").write_bytes(b"no video")
  lines = []
  for number in range(1000):
    video = "film.mp4" if 300 <= number < 450 else "a.mp4"
    row = {"id": number, "video": video, "conversations": turns("<image>\nWhat?", "A cat.")}
    lines.append(json.dumps(row) + "\n")
  (tmp_path / "rows.jsonl").write_text("".join(lines))
  return read_rows(tmp_path / "rows.jsonl")


def test_neighbours_about_one_broken_film_do_not_stop_a_run(one_bad_film):
  rows, (reader, order) = one_bad_film, reader_of(one_bad_film)
  numbers = [number for number in range(1000) if 300 <= order.row(0, number) < 450]
  stand_ins = []
  for number in numbers[:40]:
    drawn = reader.read(0, number)
    assert [row.label for row in drawn.skipped] == [rows.label(order.row(0, number))]
    stand_ins.append(drawn.row)
  assert len(numbers) == 150 and len(set(stand_ins)) > 35  # nor does one row stand in for all
  again, _ = reader_of(one_bad_film)
  assert [again.read(0, number).row for number in numbers[:40]] == stand_ins


def test_names_with_line_breaks_are_logged_in_one_line(tmp_path, caplog):
  name = "one\ntwo\r.mp4"
  row = {"video": name, "conversations": turns("<image>\nWhat?", "A cat.")}
  write_video(tmp_path / "a.mp4", pictures(8, 32, 32), fps=4)
  (tmp_path / "rows.json").write_text(json.dumps([row, row | {"video": "a.mp4"}]))
  rows, share = read_rows(tmp_path / "rows.json"), BrokenShare(1.0)
  reader, _ = reader_of(rows)
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    for number in range(2):
      share.count(reader.read(0, number))
  (record,) = caplog.records
  assert record.message.splitlines() == [record.message] and r"one\ntwo\r.mp4" in record.message
