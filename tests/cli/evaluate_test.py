"""`vcflash evaluate` on annotation files as people have them, with the tiny model."""

import json
import shutil
from pathlib import Path

import pytest

from videochat_flash_jax.cli.main import main

CASES = Path(__file__).parents[1] / "cases" / "annotations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The annotation files, and the videos that they are about."""
  folder = tmp_path_factory.mktemp("cases")
  shutil.copytree(CASES, folder, dirs_exist_ok=True)
  world = ["--videos", "2", "--frames", "8:16", "--seed", "7"]
  assert main(["synth", "--out", str(folder / "world"), *world]) == 0
  return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("VCF_CACHE_DIR", str(tmp_path / "cache"))


def evaluated(capsys, path, *options):
  """Exit code, and what was printed on both outputs."""
  capsys.readouterr()
  code = main(["evaluate", "--annotations", str(path), *options])
  return code, *capsys.readouterr()


def report_of(capsys, path):
  code, out, _ = evaluated(capsys, path, "--json")
  return code, json.loads(out)


def check_of(capsys, path):
  main(["data", "check", str(path), "--all", "--json"])
  return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("e_*")))
def test_what_training_reads_is_evaluated(folder, capsys, name):
  code, report = report_of(capsys, folder / name)
  assert (code, report["rows"], report["right"], report["broken"]) == (0, 6, 6, 0)
  assert report["by_kind"] == {
    "attribute": {"rows": 6, "questions": 6, "right": 6, "accuracy": 1.0}
  }


@pytest.mark.parametrize(
  "name, rows, reasons",
  [
    ("ev_clips.json", 2, {"bad times": 2}),
    ("ev_empty_truth.json", 0, {"bad conversations": 1}),
    ("ev_two_placeholders.json", 0, {"placeholders": 1}),
    ("s_answer.jsonl", 4, {"bad conversations": 1}),
  ],
)
def test_unusable_rows_are_counted_by_the_reasons_of_the_check(folder, capsys, name, rows, reasons):
  code, report = report_of(capsys, folder / name)
  assert (code, report["rows"], report["by_reason"]) == (1, rows, reasons)
  checked = check_of(capsys, folder / name)
  assert report["by_reason"] == checked["by_reason"]
  assert report["sources"] == checked["sources"]
  if name == "ev_clips.json":  # the cross comes later than the part that ends after half a second
    assert [wrong["id"] for wrong in report["wrong"]] == ["clip"]


def test_the_table_names_rows_that_cannot_be_used(folder, capsys):
  rows = json.loads((folder / "ev_clips.json").read_text())
  rows[0]["kind"], rows[1]["id"] = "a\n\x1b[31m", "half \ud83d"
  rows[1] |= {"start": 9, "end": 2}
  (folder / "odd.json").write_text(json.dumps(rows))
  code, out, _ = evaluated(capsys, folder / "odd.json")
  lines = out.splitlines()
  assert code == 1
  assert lines[0] == r"a\n\x1b[31m      1 of     1 right  100.0%"
  assert lines[1] == "all              1 of     1 right  100.0%"
  assert lines[3] == f"3 x bad times in {folder}/odd.json"
  assert lines[4].startswith(r"  half \ud83d: row 2: fields 'start' and 'end' are 9 and 2")


def test_rows_that_are_used_otherwise_than_they_seem_are_told(folder, capsys):
  (row, *_) = json.loads((folder / "e_bom.json").read_text("utf-8-sig"))
  (folder / "half.json").write_text(json.dumps([row | {"start": 0.5}]))
  code, out, _ = evaluated(capsys, folder / "half.json")
  assert code == 0 and "1 rows with only one of start and end" in out


def test_nothing_is_a_share_of_no_questions(folder, capsys):
  code, report = report_of(capsys, folder / "ev_empty_truth.json")
  assert (code, report["questions"], report["accuracy"]) == (1, 0, None)
  _, out, _ = evaluated(capsys, folder / "ev_empty_truth.json")
  assert out.splitlines()[0] == "all              0 of     0 right"


def test_what_cannot_be_evaluated_is_refused_in_one_line(folder, capsys):
  for options, said in (
    ([folder / "gone.json"], "gone.json: cannot be read"),
    ([folder / "dup_column.csv"], "not a mixture"),
    ([folder / "dup_datasets.yaml"], "line 3: key 'datasets' stands twice"),
    ([folder / "dup_key_in_entry.yaml"], "line 3: key 'json_path' stands twice"),
    ([folder / "e_bom.json", "--max-frames", "0"], "--max-frames is 0"),
  ):
    code, out, err = evaluated(capsys, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
