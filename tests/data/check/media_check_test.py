"""The check of a mixture finds what is broken in it, and nothing else."""

import collections
import json
import os
import signal

import av
import pytest
from PIL import Image

from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.mutations import turns, write_mutated_mixture
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.check import media_check
from videochat_flash_jax.data.check.check_report import as_json, as_table
from videochat_flash_jax.data.check.media_check import (
  NUM_OFFENDERS,
  check_mixture,
  check_roots,
  check_sources,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.errors import InputError


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
  return write_mutated_mixture(tmp_path_factory.mktemp("mutated"), 200, 100, 60, seed=5)


@pytest.fixture(scope="module")
def reports(mutated):
  return check_mixture(open_rows(read_mixture(mutated.path), mutated.path.parent / "cache"), None)


def test_all_that_is_broken_is_counted_under_its_reason(mutated, reports):
  expected = collections.Counter(mutated.expected.values())
  found = sum((report.broken for report in reports), collections.Counter())
  unsure = found["unreadable video"] - expected["unreadable video"]
  assert 0 <= unsure <= len(mutated.doubtful)
  found["unreadable video"] -= unsure
  assert found == expected


def test_rows_kinds_and_media_are_counted(mutated, reports):
  videos, images, texts = reports
  assert [report.rows for report in reports] == [330, 15, 15]
  assert (videos.kinds, images.kinds, texts.kinds) == ({"video": 330}, {"image": 15}, {"text": 15})
  assert images.opened == {"image": 22}  # every second row has two
  assert not images.broken + texts.broken
  assert texts.words == 15 * 5
  assert videos.frames / videos.seconds == pytest.approx(10)


def test_the_first_offenders_are_named(mutated, reports):
  for reason, messages in reports[0].offenders.items():
    assert len(messages) == min(NUM_OFFENDERS, reports[0].broken[reason])
    for message in messages:
      label = message.partition(":")[0]
      assert mutated.expected.get(label, "unreadable video") == reason
  table = as_table(reports)
  assert f"{reports[0].broken['bad json']} x bad json in {reports[0].source}" in table
  assert f"{sum(reports[0].broken.values())}  all" in table
  assert (
    json.loads(json.dumps(as_json(reports)))["by_reason"]["bad json"]
    == (reports[0].broken["bad json"])
  )


def test_a_sample_is_spread_over_the_rows(tmp_path):
  write_video(tmp_path / "a.mp4", pictures(10))
  rows = [
    {"id": i, "video": "a.mp4" if i != 50 else "none.mp4", "conversations": turns("<image>?", "!")}
    for i in range(100)
  ]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  opened = open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache")
  (report,) = check_mixture(opened, 4)  # rows 0 25 50 75
  assert report.opened == {"video": 3}
  assert (report.frames, report.broken) == (30, {"missing file": 1})
  assert check_mixture(opened, 0)[0].opened == {}
  assert "nothing is broken" in as_table(check_mixture(opened, 0))


def test_a_check_agrees_with_a_run_about_each_row(tmp_path):
  write_video(tmp_path / "a.mp4", pictures(10))
  (tmp_path / "tvqa").mkdir()
  for number, picture in enumerate(pictures(12)):  # 4 s at the rate of that set
    Image.fromarray(picture).save(tmp_path / "tvqa" / f"{number}.png")
  shown = [
    {"video": ["a.mp4", "a.mp4"]},
    {"video": ["a.mp4"]},
    {"video": "tvqa", "video_read_type": "img", "start": 1, "end": 3},
    {"video": "tvqa", "video_read_type": "img", "start": 6, "end": 9},
    {"video": "a.mp4", "start": 0, "end": 100},
    {"video": "https://nowhere.invalid/a", "video_read_type": "img"},
  ]
  rows = [
    {**fields, "id": number, "conversations": turns("<image>" * (1 + (number == 0)) + "?", "!")}
    for number, fields in enumerate(shown)
  ]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  opened = open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache")
  (report,) = check_mixture(opened, None)
  failed = collections.Counter()
  for number in range(len(rows)):
    try:
      read_row_video(opened[number], ExampleConfig(image_size=32))
    except BrokenRow as error:
      failed[error.reason] += 1
  assert report.broken == failed == {"bad media field": 1, "bad times": 2, "unreadable video": 1}


def test_an_image_too_long_to_be_padded_is_found_where_it_is_not_alone(tmp_path):
  Image.new("RGB", (1, 17_000)).save(tmp_path / "line.png")
  rows = [
    {"image": ["line.png"] * count, "conversations": turns("<image>" * count + "?", "!")}
    for count in (1, 2)
  ]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  opened = open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache")
  (report,) = check_mixture(opened, None)
  assert report.broken == {"unreadable image": 1}  # as in `examples_test`


def test_broken_files_are_not_held_open(tmp_path):
  data = write_video(tmp_path / "a.mkv", pictures(40)).read_bytes()
  rows = []
  for number in range(20):
    (tmp_path / f"{number}.mkv").write_bytes(data[: len(data) // 2])
    rows.append({"video": f"{number}.mkv", "conversations": turns("<image>?", "!")})
  (tmp_path / "a.json").write_text(json.dumps(rows))
  opened = open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache")
  opened[0]
  before = len(os.listdir("/proc/self/fd"))
  (report,) = check_mixture(opened, None)
  assert report.broken == {"unreadable video": 20}
  assert len(os.listdir("/proc/self/fd")) == before


def write_sources(folder):
  """Two healthy sources, and between them three of which no row can be read."""
  write_video(folder / "a.mp4", pictures(8))
  row = {"video": "a.mp4", "conversations": turns("<image>?", "!")}
  for name in ("a.json", "e.json"):
    (folder / name).write_text(json.dumps([row]))
  (folder / "c.json").write_text(json.dumps([row])[:-9])
  names = "a.json", "b.json", "c.json", "d.json", "e.json"
  entries = [{"json_path": name} for name in names]
  entries[3] |= {"json_path": "a.json", "sampling_strategy": "first4:1"}
  (folder / "mixture.yaml").write_text(json.dumps({"datasets": entries}))
  return read_mixture(folder / "mixture.yaml")


def test_sources_that_cannot_be_read_have_a_line_each_and_the_others_are_checked(tmp_path):
  reports = check_sources(write_sources(tmp_path), None, tmp_path / "cache")
  said = ["", "cannot be read", "broken JSON", "keeps no row", ""]
  assert [said in report.problem for said, report in zip(said, reports, strict=True)] == [True] * 5
  assert [bool(report.problem) for report in reports] == list(map(bool, said))
  assert [report.opened.total() for report in reports] == [1, 0, 0, 0, 1]
  lines = as_table(reports).splitlines()
  assert [line.split()[-2] for line in lines[1:7]] == ["0", "all", "all", "all", "0", "0"]
  assert f"nothing of {tmp_path / 'b.json'}" in lines and "nothing is broken" not in lines
  assert json.loads(json.dumps(as_json(reports)))["sources"][2]["problem"] == reports[2].problem


def killed(checked, opened):
  """In place of a check, in a process of its own: as if memory had run out there."""
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line_that_names_rows(tmp_path, monkeypatch):
  rows = [{"id": f"n{n}", "conversations": turns("?", "!")} for n in range(5000)]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  opened = open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache")
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  monkeypatch.setattr(media_check, "_check_kept_rows", killed)
  said = r"a\.json: a process .* was killed, .*; 2048 rows from n0 on are .*; free some memory"
  with pytest.raises(InputError, match=said) as error:
    check_mixture(opened, 0)
  assert "\n" not in str(error.value)


def test_a_wrong_data_root_is_named_with_its_source(tmp_path):
  (tmp_path / "media").mkdir()
  write_video(tmp_path / "media" / "a.mp4", pictures(8))
  row = {"video": "a.mp4", "conversations": turns("<image>?", "!")}
  rows = [row | {"video": "gone.mp4"}] * 40 + [row] * 9  # a few that are missing do not matter
  (tmp_path / "a.json").write_text(json.dumps(rows))
  (tmp_path / "b.json").write_text(json.dumps([{"conversations": turns("?", "!")}]))

  def check(root):
    entries = [{"json_path": "a.json", "data_root": root}, {"json_path": "b.json"}]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": entries}))
    check_roots(open_rows(read_mixture(tmp_path / "mixture.yaml"), tmp_path / "cache"))

  check("media")
  with pytest.raises(InputError, match=r"a\.json, data_root .*/medai: .*gone\.mp4: no such file"):
    check("medai")


def test_rows_with_only_one_of_start_and_end_are_counted_though_a_run_uses_them(tmp_path):
  write_video(tmp_path / "a.mp4", pictures(8))
  row = {"video": "a.mp4", "conversations": turns("<image>?", "!")}
  rows = [row, row | {"start": 0.1}, row | {"end": 0.5}, row | {"start": 0, "end": 0.5}]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  reports = check_mixture(open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache"), None)
  assert (reports[0].half_clips, reports[0].broken) == (2, {})
  table = as_table(reports)
  assert "2 rows with only one of start and end" in table and "nothing is broken" in table


def test_damaged_videos_are_counted_though_a_run_uses_them(tmp_path):
  for name in ("a.mp4", "b.mp4"):
    write_video(tmp_path / name, pictures(40), codec="mpeg4", options={"g": "12"})
  with av.open(str(tmp_path / "b.mp4")) as container:
    position, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][-1]
  data = bytearray((tmp_path / "b.mp4").read_bytes())
  data[position + size // 2 : position + size] = bytes(size - size // 2)
  (tmp_path / "b.mp4").write_bytes(data)
  rows = [{"video": name, "conversations": turns("<image>?", "!")} for name in ("a.mp4", "b.mp4")]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  reports = check_mixture(open_rows(read_mixture(tmp_path / "a.json"), tmp_path / "cache"), None)
  assert (reports[0].damaged, reports[0].opened, reports[0].broken) == (1, {"video": 2}, {})
  assert f"1 damaged videos in {tmp_path / 'a.json'}" in as_table(reports)
