"""Counting right answers, and refusing annotation files that cannot be used."""

import json

import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.evals.exact_match import evaluate, read_rows


def row(video="a.mp4", question="<image>\nWho?", answer="red", **more):
  turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
  return {"video": video, "conversations": turns, **more}


class FakeChat:
  """Answers every question with the name of the video, and counts what it watches."""

  def __init__(self, folder):
    self.folder = folder
    self.watched = []

  def watch(self, path, max_frames, progress):
    assert path.parent == self.folder
    self.watched.append(path.name)
    self.name = path.stem
    return self

  def reset(self):
    pass

  def ask(self, question):
    assert question == "Who?"
    return f" {self.name.upper()}. "


def test_rows_are_counted_by_kind_and_each_video_is_watched_once(tmp_path):
  rows = [row("red.mp4", kind="x"), row("blue.mp4", kind="y"), row("red.mp4", answer="blue")]
  file = tmp_path / "rows.json"
  file.write_text(json.dumps(rows))
  chat, answers = FakeChat(tmp_path), []
  scores = evaluate(
    chat, read_rows(file), tmp_path, on_answer=lambda *answer: answers.append(answer)
  )
  assert {kind: (s.rows, s.right) for kind, s in scores.items()} == {
    "all": (3, 1),
    "x": (1, 1),
    "y": (1, 0),
  }
  assert scores["all"].accuracy == 1 / 3
  assert sorted(chat.watched) == ["blue.mp4", "red.mp4"]
  calls = [(row["video"], *rest) for row, *rest in answers]
  assert calls[0] == ("blue.mp4", "Who?", " BLUE. ", "red", False)
  assert [right for *_, right in calls] == [False, True, False]


@pytest.mark.parametrize(
  "text, message",
  [
    ("not json", "not valid JSON"),
    ("[]", "no list of rows"),
    ("{}", "no list of rows"),
    (json.dumps([{"conversations": []}]), "row 0 has no field 'video'"),
    (json.dumps([row(), {"video": "a.mp4"}]), "conversations"),
    (json.dumps([{"video": "a", "conversations": [{"from": "gpt", "value": "x"}]}]), "row 0 needs"),
    (json.dumps([row(), row(kind=7)]), r"rows\.json: row 1: field 'kind' is not text"),
    (json.dumps([row(kind=None)]), r"rows\.json: row 0: field 'kind' is not text"),
    (json.dumps([row(question="<image>\n")]), r"rows\.json: row 0: the question .* is empty"),
    (json.dumps([row(answer=3)]), r"rows\.json: row 0: row 'a\.mp4': conversations\[1\]"),
    ("[" * 100_000, r"rows\.json: not valid JSON"),
  ],
)
def test_unusable_annotations_are_named(tmp_path, text, message):
  file = tmp_path / "rows.json"
  file.write_text(text)
  with pytest.raises(InputError, match=message):
    read_rows(file)


def test_a_file_may_have_one_row_on_each_line(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_text(f"{json.dumps(row())}\n\n{json.dumps(row(kind='attribute'))}\n")
  assert read_rows(file) == [row(), row(kind="attribute")]


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(InputError, match=r"nothing\.json: cannot be read"):
    read_rows(tmp_path / "nothing.json")
