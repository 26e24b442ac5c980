"""Counting right answers; what cannot be asked is found before, counted by reason, not scored."""

import json

import pytest

from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.annotation_rows import open_all
from tests.data.mixture.mutations import turns
from videochat_flash_jax.data.check.media_check import check_mixture
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.evals.exact_match import evaluate, questions_of_row


def row(video="red.mp4", question="<image>\nWho?", answer="red", **more):
  return {"video": video, "conversations": turns(question, answer), **more}


class FakeChat:
  """Answers every question with the name of the video, and keeps what it saw and was asked."""

  def __init__(self, broken=(), too_long=()):
    self.broken, self.too_long = broken, too_long
    self.seen, self.asked = [], []

  def see_row(self, row, max_frames):
    self.name = row["video"].rpartition("/")[2].removesuffix(".mp4")
    self.seen.append((self.name, row.get("start"), row.get("end")))
    if self.name in self.broken:
      raise BrokenRow("unreadable video", f"{row['video']}: ends early")
    return self

  def reset(self):
    self.asked.append([])

  def ask(self, question):
    if question in self.too_long:
      raise InputError("the prompt is longer than the context")
    self.asked[-1].append(question)
    return f" {self.name.upper()}. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("videos")
  for name in ("red", "blue", "green"):
    write_video(folder / f"{name}.mp4", pictures(40), fps=4)  # 10 s
  return folder


def evaluated(folder, rows, chat=None, name="rows.json", **options):
  """Evaluates rows; given as a text, they are written as they are."""
  path = folder / name
  path.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
  return evaluate(open_all(path), lambda: chat or FakeChat(), **options)


def counts(found):
  return {kind: (s.rows, s.questions, s.right) for kind, s in found.scores.items()}


def test_rows_are_counted_by_kind_and_each_video_is_seen_once(folder):
  rows = [row(kind="x"), row("blue.mp4", kind="y"), row(answer="blue"), row(kind=7)]
  chat, answers = FakeChat(), []
  found = evaluated(folder, rows, chat, on_answer=lambda *answer: answers.append(answer))
  assert counts(found) == {"all": (4, 4, 2), "x": (1, 1, 1), "y": (1, 1, 0)}
  assert found.scores["all"].accuracy == 1 / 2
  assert chat.seen == [("blue", None, None), ("red", None, None)]
  calls = [(row["video"].rpartition("/")[2], *rest) for row, *rest in answers]
  assert calls[0] == ("blue.mp4", "Who?", " BLUE. ", "red", False)
  assert [right for *_, right in calls] == [False, True, False, True]
  assert not found.sources[0].broken


LINE = json.dumps(row(), ensure_ascii=False)


@pytest.mark.parametrize(
  "text, num_rows",
  [
    (f"\ufeff[{LINE}, {LINE}]", 2),
    (f"{LINE}\n\n{LINE}\n", 2),
    (f"{LINE}\r\n{LINE}\r\n", 2),
    (f"[{LINE}]", 1),
    (LINE.replace("Who?", "Who,\u2028who,\x85who?"), 1),
  ],
)
@pytest.mark.parametrize("name", ["a.json", "b.jsonl", "C.JSON", "D.JsonL"])
def test_a_file_is_read_as_for_training(folder, name, text, num_rows):
  found = evaluated(folder, text.encode(), name=name)
  assert counts(found) == {"all": (num_rows, num_rows, num_rows)}


def test_a_mixture_is_evaluated_with_its_roots_and_samples(folder, tmp_path):
  for name in "ab":
    lines = [json.dumps(row("red.mp4" if name == "a" else "blue.mp4"))] * 3
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  entries = [{"json_path": f"{name}.jsonl", "data_root": str(folder)} for name in "ab"]
  entries[1]["sampling_strategy"] = "first:1"
  (tmp_path / "m.yaml").write_text(json.dumps({"datasets": entries}))
  found = evaluate(open_all(tmp_path / "m.yaml"), FakeChat)
  assert counts(found) == {"all": (4, 4, 3)}
  assert [report.rows for report in found.sources] == [3, 1]


UNUSABLE = [
  (row(answer="  "), "bad conversations"),
  (row(answer="half \ud83d"), "bad conversations"),
  (row(question="<image>\n"), "bad conversations"),
  (row(conversations=[]), "bad conversations"),
  (row(question="<image><image>Who?"), "placeholders"),
  (row(question="Who?"), "placeholders"),
  (row("gone.mp4"), "missing file"),
  (row("words.mp4"), "unreadable video"),
  (row(3), "bad media field"),
  (row(None), "bad media field"),
  (row(start=5000, end=6000), "bad times"),
  (row(start=9, end=2), "bad times"),
  (row(start=1, end=1.1), "bad times"),
  ([], "bad json"),
]


def test_unusable_rows_are_found_before_the_model_is_loaded_and_never_scored(folder):
  (folder / "words.mp4").write_text("No video.")
  rows = [broken for broken, _ in UNUSABLE]
  found = evaluated(folder, [row(), *rows])
  expected = {}
  for _, reason in UNUSABLE:
    expected[reason] = expected.get(reason, 0) + 1
  assert found.sources[0].broken == expected
  assert counts(found) == {"all": (1, 1, 1)}

  def load():
    raise AssertionError("no row can be used")

  (folder / "rows.json").write_text(json.dumps([row(answer=""), *rows[1:]]))
  opened = open_all(folder / "rows.json")
  found = evaluate(opened, load)
  assert counts(found) == {"all": (0, 0, 0)} and found.scores["all"].accuracy is None
  asked_nothing = {"bad conversations": 1}  # a run can use a question without words
  (checked,) = check_mixture(opened, None)
  assert found.sources[0].broken - checked.broken == asked_nothing


def test_a_video_that_breaks_costs_its_rows_and_not_the_answers(folder):
  rows = [row("blue.mp4"), row("green.mp4", kind="x"), row("green.mp4"), row()]
  found = evaluated(folder, rows, FakeChat(broken=["green"]))
  assert counts(found) == {"all": (2, 2, 1)}
  assert found.sources[0].broken == {"unreadable video": 2}
  assert "green.mp4: ends early" in found.sources[0].offenders["unreadable video"][0]


def test_a_file_that_changes_meanwhile_costs_no_answer(folder):
  def load():
    (folder / "rows.json").write_text("[]")
    return FakeChat()

  (folder / "rows.json").write_text(json.dumps([row(), row("blue.mp4")]))
  assert counts(evaluate(open_all(folder / "rows.json"), load)) == {"all": (2, 2, 1)}


def test_a_question_that_is_too_long_costs_its_row(folder):
  rows = [row(), row(question="<image>\nLong?")]
  rows.append(row(conversations=turns("<image>\nWho?", "red", "Long?", "red")))
  found = evaluated(folder, rows, FakeChat(too_long=["Long?"]))
  assert counts(found) == {"all": (1, 1, 1)}
  assert found.sources[0].broken == {"too long": 2}


def test_each_part_of_a_video_is_seen_alone(folder):
  parts = [{}, {"start": 0, "end": 2}, {"start": "0", "end": 2.0}, {"start": 2, "end": 4}]
  chat = FakeChat()
  evaluated(folder, [row(**part) for part in parts], chat)
  assert sorted(chat.seen, key=str) == [("red", 0, 2), ("red", 2, 4), ("red", None, None)]


@pytest.mark.parametrize(
  "texts, questions",
  [
    (["<image>\nWho?", "A cat."], [("Who?", "A cat.")]),
    (["<image>Who?", "A.", "When? ", "B."], [("Who?", "A."), ("When?", "B.")]),
    (["Who <image>?", " ", "When?", "B."], [("Who ?\nWhen?", "B.")]),
  ],
)
def test_the_questions_of_a_row_have_no_placeholders(texts, questions):
  said = turns(*texts)
  assert questions_of_row({"video": "a", "conversations": said}) == questions
  opened = [{"from": "gpt", "value": "Hello."}, *said]  # left out, as in training
  assert questions_of_row({"video": "a", "conversations": opened}) == questions


def test_the_questions_of_a_conversation_are_asked_in_turn(folder):
  chat = FakeChat()
  found = evaluated(folder, [row(conversations=turns("<image>Who?", "red", "When?", "x"))], chat)
  assert counts(found) == {"all": (1, 2, 1)} and chat.asked == [["Who?", "When?"]]


@pytest.mark.parametrize(
  "text, message",
  [
    ("not json", r"rows\.json: holds no row"),
    ("[]", r"rows\.json: holds no row"),
    ("[" * 100_000, r"rows\.json: broken JSON"),
  ],
)
def test_a_file_without_rows_is_refused(folder, text, message):
  with pytest.raises(InputError, match=message):
    evaluated(folder, text.encode())


def test_a_missing_file_is_named(folder):
  with pytest.raises(InputError, match=r"nothing\.json: cannot be read"):
    open_all(folder / "nothing.json")
