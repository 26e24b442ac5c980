"""Exact match: the share of questions whose answer is word for word the true answer.

Rows are read and checked as training does it, and `vcflash data check`. A row that cannot be used
is found before the model is loaded, counted by its reason, and not scored.
"""

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from videochat_flash_jax.data.check.media_check import SourceReport, usable_rows
from videochat_flash_jax.data.mixture.annotations import annotated_clip, kind_of
from videochat_flash_jax.data.mixture.broken import BrokenRow, because
from videochat_flash_jax.data.mixture.rows import Rows
from videochat_flash_jax.data.text.conversation import PLACEHOLDER, has_words, placed_turns
from videochat_flash_jax.inference.chat import VideoChat


@dataclasses.dataclass
class Score:
  """Number of annotation rows that were scored, of their questions, and of right answers."""

  rows: int = 0
  questions: int = 0
  right: int = 0

  @property
  def accuracy(self) -> float | None:
    """The share of right answers; None if there are no questions."""
    return self.right / self.questions if self.questions else None


@dataclasses.dataclass
class Evaluation:
  """How well a model answers the questions of annotation rows.

  Attributes:
    scores: of each kind of rows, and of "all" rows that could be used.
    sources: what was found in each annotation file, with the rows that cannot be used.
  """

  scores: dict[str, Score]
  sources: list[SourceReport]


def evaluate(
  rows: Rows,
  load_chat: Callable[[], VideoChat],
  max_frames: int | None = None,
  on_answer: Callable[[dict, str, str, str, bool], None] = lambda *_: None,
) -> Evaluation:
  """Asks the questions of every row in a new conversation, and counts the right answers.

  Upper and lower case, and a full stop at the end, make no difference.

  Args:
    rows: rows of `open_rows`. Each text in their field `kind` gets its own score.
    load_chat: returns the model; called after all rows are checked, if any can be used.
    max_frames: the most frames to encode of a video.
    on_answer: is called after each answer with the row, its question, the model's answer, the true
      answer, and whether they agree.

  Raises:
    InputError: an annotation file is missing or has changed, or the model cannot be used.
  """
  reports = [SourceReport(source.json_path) for source in rows.sources]
  scores: dict[str, Score] = defaultdict(Score, all=Score())
  asked = _rows_to_ask(rows, reports)
  chat = load_chat() if asked else None
  bar = tqdm(total=len(asked), desc="answering", unit="row", leave=False, disable=None)
  with bar:
    for _, same in itertools.groupby(asked, key=lambda found: found.shown):
      same = list(same)
      try:
        seen = chat.see_row(same[0].row, max_frames)  # once for all of these rows
      except BrokenRow as error:
        for found in same:
          found.report.add_broken(rows.label(found.number), error)
        bar.update(len(same))
        continue
      for found in same:
        try:
          _ask(seen, found.row, scores, on_answer)
        except BrokenRow as error:
          found.report.add_broken(rows.label(found.number), error)
        bar.update()
  return Evaluation(dict(scores), reports)


def questions_of_row(row: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the questions of a row with their true answers, without placeholders.

  A question without an answer is a part of the next question.

  Raises:
    BrokenRow: there is no question with an answer, or one is empty.
  """
  with because("bad conversations"):
    turns = placed_turns(row)
  questions, parts = [], []
  for turn in turns:
    text = turn.text.replace(PLACEHOLDER, "").strip()
    if turn.role == "human":
      parts.append(text)
    elif parts and has_words(text):
      questions.append(("\n".join(filter(None, parts)), text))
      parts = []
  if not all(question for question, _ in questions):
    raise BrokenRow("bad conversations", "a question is empty; write a question")
  return questions


class _RowToAsk(NamedTuple):
  """A row that can be used, its number in the mixture, and the report of its source.

  Rows about the same part of the same video, or about the same images, have the same `shown`.
  """

  shown: str
  row: dict
  number: int
  report: SourceReport


def _rows_to_ask(rows, reports) -> list[_RowToAsk]:
  """Checks all rows and opens all of their media; returns those that can be used, by `shown`."""
  found = []
  for number, row, report in usable_rows(rows, reports):
    try:
      questions_of_row(row)
    except BrokenRow as error:
      report.add_broken(rows.label(number), error)
    else:
      found.append(_RowToAsk(_shown(row), row, number, report))
  return sorted(found, key=lambda row: row.shown)


def _shown(row):
  kind = kind_of(row)
  return json.dumps([kind, row.get(kind), annotated_clip(row), row.get("video_read_type")])


def _ask(seen, row, scores, on_answer):
  """Asks the questions of a row and counts its answers, all or none of them."""
  seen.reset()
  questions = questions_of_row(row)
  with because("too long"):
    answers = [seen.ask(question) for question, _ in questions]
  kinds = {"all", row["kind"]} if isinstance(row.get("kind"), str) else {"all"}
  for (question, truth), answer in zip(questions, answers, strict=True):
    right = _normalise(answer) == _normalise(truth)
    for kind in kinds:
      scores[kind].questions += 1
      scores[kind].right += right
    on_answer(row, question, answer, truth, right)
  for kind in kinds:
    scores[kind].rows += 1


def _normalise(text):
  return text.strip().rstrip(".").lower()
