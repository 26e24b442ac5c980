"""The check of a mixture finds what is broken in it, and nothing else."""

import collections
import json

import pytest

from tests.data.mutations import turns, write_mutated_mixture
from tests.data.video_files import pictures, write_video
from videochat_flash_jax.data.check_report import as_json, as_table
from videochat_flash_jax.data.media_check import NUM_OFFENDERS, check_mixture
from videochat_flash_jax.data.mixture import read_mixture
from videochat_flash_jax.data.rows import open_rows


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
