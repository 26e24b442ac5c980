"""`vcflash data`: exit codes, what is printed, and what is written."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.mutations import turns, write_mutated_mixture
from videochat_flash_jax.cli.main import main

SMALL_CONFIG = Path(__file__).parents[1] / "train" / "small_config.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("VCF_CACHE_DIR", str(tmp_path / "cache"))


def data(capsys, *arguments):
  """Exit code, and what was printed on both outputs."""
  code = main(["data", *map(str, arguments)])
  return code, *capsys.readouterr()


def healthy(folder):
  write_video(folder / "a.mp4", pictures(8))
  path = folder / "rows.json"
  path.write_text(json.dumps([{"video": "a.mp4", "conversations": turns("<image>?", "!")}]))
  return path


def test_a_healthy_file_gives_0_and_a_broken_one_1(tmp_path, capsys):
  code, out, err = data(capsys, "check", healthy(tmp_path), "--all")
  assert (code, err) == (0, "")
  assert "nothing is broken" in out
  (tmp_path / "a.mp4").unlink()
  code, out, _ = data(capsys, "check", tmp_path / "rows.json")
  assert code == 1
  assert "1 x missing file" in out


def test_the_report_as_json_holds_all_counts(tmp_path, capsys):
  mixture = write_mutated_mixture(tmp_path, 22, 0, 8, seed=0)
  code, out, _ = data(capsys, "check", mixture.path, "--all", "--json")
  report = json.loads(out)
  assert (code, report["rows"], report["broken"]) == (1, 30, 22)
  assert report["by_reason"]["bad conversations"] == 6
  assert [source["rows"] for source in report["sources"]] == [26, 2, 2]


def test_with_the_config_of_a_run_rows_that_are_too_long_are_found(tmp_path, capsys):
  write_video(tmp_path / "a.mp4", pictures(8))
  short, long = turns("<image>?", "!"), turns("<image>?", "word " * 100)
  rows = [
    {"id": "fits", "video": "a.mp4", "conversations": short},
    {"id": "cut", "video": "a.mp4", "conversations": long},
    {"id": "cut text", "conversations": turns("?", "word " * 100)},
    {"id": "no room", "video": "a.mp4", "conversations": turns("<image>?" + "word " * 100, "!")},
  ]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  mixture = {"datasets": [{"json_path": "rows.json", "media_type": "mix"}]}
  (tmp_path / "mixture.yaml").write_text(json.dumps(mixture))
  check = ["check", tmp_path / "mixture.yaml", "--json"]
  code, out, _ = data(capsys, *check)
  assert (code, json.loads(out)["broken"], json.loads(out)["sources"][0]["cut"]) == (0, 0, 0)
  code, out, _ = data(capsys, *check, "--config", SMALL_CONFIG)
  (source,) = json.loads(out)["sources"]
  assert (code, source["broken"], source["cut"]) == (1, {"too long": 1}, 2)
  assert source["offenders"]["too long"][0].startswith("no room: ")
  code, out, _ = data(capsys, *check, "--config", SMALL_CONFIG, "--config.tokens_per_row=2048")
  (source,) = json.loads(out)["sources"]
  assert (code, source["broken"], source["cut"]) == (0, {}, 0)
  code, out, _ = data(capsys, *check[:2], "--config", SMALL_CONFIG)
  assert f"2 rows with answers too long for a training row in {tmp_path}/rows.json; a run" in out


def test_the_config_of_several_stages_is_refused(tmp_path, capsys):
  tiny = Path(__file__).parents[2] / "configs" / "tiny.py"
  code, _, err = data(capsys, "check", healthy(tmp_path), "--config", tiny)
  assert code == 2
  assert "has the stages stage0_encoder, " in err and "give the config of one run" in err


@pytest.mark.parametrize(
  "changes, message",
  [
    (["--config.mesh.sequence=-1"], "config.mesh.sequence is -1: give the number of devices"),
    (["--config.init_from="], "config.init_from is missing"),
    (["--config.tokens_per_rwo=3"], "the config has no field 'tokens_per_rwo'"),
  ],
)
def test_a_config_that_says_too_little_is_refused(tmp_path, capsys, changes, message):
  code, out, err = data(capsys, "check", healthy(tmp_path), "--config", SMALL_CONFIG, *changes)
  assert (code, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["index", "none.yaml", "--config.seed=3"], "unknown argument --config.seed=3"),
    (["check", "none.yaml"], "none.yaml: cannot be read"),
    (["check", "none.json"], "none.json: cannot be read"),
    (["check", "none.json", "--sample", "-1"], "--sample is -1"),
    (["check", "none.json", "--al"], "unknown argument --al"),
    (["chek", "none.json"], "invalid choice: 'chek'"),
    ([], "<action>"),
    (["convert", "none.csv", "--out", "rows.jsonl"], "none.csv: No such file"),
  ],
)
def test_what_cannot_be_used_gives_2_and_one_line(
  tmp_path, monkeypatch, capsys, arguments, message
):
  monkeypatch.chdir(tmp_path)
  code, out, err = data(capsys, *arguments)
  assert (code, out) == (2, "")
  assert message in err
  assert err.count("\n") == 1


def test_an_index_is_made_ahead(tmp_path, capsys):
  code, out, _ = data(capsys, "index", healthy(tmp_path))
  assert code == 0
  assert "1 row(s) of 1 file(s) are ready after" in out
  assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1


def test_files_that_cannot_be_read_are_skipped_and_give_1(tmp_path, capsys):
  healthy(tmp_path)
  entries = [{"json_path": name} for name in ("gone.json", "rows.json")]
  (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": entries}))
  code, out, err = data(capsys, "check", tmp_path / "mixture.yaml")
  assert (code, err) == (1, "")
  assert f"nothing of {tmp_path}/gone.json\n  {tmp_path}/gone.json: cannot be read" in out
  code, out, err = data(capsys, "index", tmp_path / "mixture.yaml")
  assert (code, err) == (1, "")
  assert "gone.json: cannot be read" in out and "1 row(s) of 1 file(s) are ready" in out


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path, capsys):
  cache = tmp_path / "cache" / "rows"
  for name, days in (("building-old", 2), ("building-new", 0), ("0123", 2)):
    (cache / name / "index").mkdir(parents=True)
    then = time.time() - days * 24 * 3600
    os.utime(cache / name, (then, then))
  assert data(capsys, "index", healthy(tmp_path))[0] == 0
  assert {"building-new", "0123"} < {folder.name for folder in cache.iterdir()}
  assert not (cache / "building-old").exists()


TABLE = """\ufeffvideo,image,question,answer,id,start,end
a.mp4,,What moves?,"A cat, and
a dog.",one,,
b/c.mp4,,"<image>When?",Später.,,2,8.5
,d.png,What is it?,A star.,,,
,,How many are two?,2,,,
"""


def test_a_table_becomes_rows(tmp_path, capsys):
  (tmp_path / "table.csv").write_text(TABLE)
  code, out, _ = data(capsys, "convert", tmp_path / "table.csv", "--out", tmp_path / "rows.jsonl")
  assert (code, out) == (0, f"{tmp_path}/rows.jsonl: 4 row(s) written\n")
  rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
  assert rows == [
    {
      "video": "a.mp4",
      "id": "one",
      "conversations": turns("<image>\nWhat moves?", "A cat, and\na dog."),
    },
    {"video": "b/c.mp4", "start": 2, "end": 8.5, "conversations": turns("<image>When?", "Später.")},
    {"image": "d.png", "conversations": turns("<image>\nWhat is it?", "A star.")},
    {"conversations": turns("How many are two?", "2")},
  ]


def test_rows_are_converted_from_lists_too(tmp_path, capsys):
  code, _, _ = data(capsys, "convert", healthy(tmp_path), "--out", tmp_path / "rows.jsonl")
  assert code == 0
  (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
  assert json.loads(line) == json.loads((tmp_path / "rows.json").read_text())[0]


def test_names_in_another_encoding_are_converted(tmp_path, capsys):
  row = {"id": "\ud83d", "video": "caf\udce9.mp4", "conversations": turns("<image>Später?", "!")}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  code, _, _ = data(capsys, "convert", tmp_path / "a.json", "--out", tmp_path / "rows.jsonl")
  assert code == 0
  text = (tmp_path / "rows.jsonl").read_text("utf-8")
  assert "Später" in text and json.loads(text) == row


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.csv", "video,question,answer\na.mp4,Q?,A\na.mp4,Q?,\n", "a.csv line 3: bad conversations"),
    ("a.csv", "video,question,answer,start,end\na.mp4,Q?,A,5,2\n", "a.csv line 2: bad times"),
    ("a.csv", "video,question,answer,end\na.mp4,Q?,A,2\n", "a.csv line 2: bad times: only one"),
    ("a.csv", "video,question,answer\na.mp4,Q?,A,more\n", "a.csv line 2: bad json"),
    ("a.csv", "video,qestion,answer\n", "unknown column 'qestion'; did you mean question"),
    ("a.csv", "video,question,question,answer\n", "a.csv line 1: column 'question' stands twice"),
    ("a.csv", "", "holds no row"),
    ("a.jsonl", '\n{"id": 1,\t"id": 2}', "a.jsonl line 2: bad json: key 'id' stands twice"),
    ("a.jsonl", '\n{"id": 1}\n{"id": 2}\n\nx', "a.jsonl line 2: bad conv"),
    ("a.jsonl", "\n\nx\ny\n\nz", "nothing was written; rows of these lines are broken, too: 4, 6"),
    ("a.jsonl", "x\n" * 9, "are broken, too: 2, 3, 4, 5, 6 and 3 more"),
    ("a.json", "[\n\n 3]", "a.json line 3: bad json"),
    ("a.json", "[", "broken JSON"),
  ],
)
def test_a_row_that_cannot_be_used_is_named_and_nothing_is_written(
  tmp_path, capsys, name, text, message
):
  (tmp_path / name).write_text(text)
  code, _, err = data(capsys, "convert", tmp_path / name, "--out", tmp_path / "rows.jsonl")
  assert code == 2
  assert message in err
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_that_exists_is_kept(tmp_path, capsys):
  (tmp_path / "rows.jsonl").write_text("mine")
  code, _, err = data(capsys, "convert", healthy(tmp_path), "--out", tmp_path / "rows.jsonl")
  assert code == 2
  assert "exists already" in err
  assert (tmp_path / "rows.jsonl").read_text() == "mine"
