"""Exact match: the share of questions whose answer is word for word the true answer."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from videochat_flash_jax.data.text.conversation import PLACEHOLDER, turns_of_row
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat


@dataclasses.dataclass
class Score:
  """Number of annotation rows, and of right answers among them."""

  rows: int = 0
  right: int = 0

  @property
  def accuracy(self) -> float:
    """The share of right answers; 0 if there are no rows."""
    return self.right / self.rows if self.rows else 0.0


def evaluate(
  chat: VideoChat,
  rows: Sequence[dict],
  folder: Path,
  max_frames: int | None = None,
  on_answer: Callable[[dict, str, str, str, bool], None] = lambda *_: None,
) -> dict[str, Score]:
  """Asks the question of every row in a new conversation, and counts the right answers.

  Upper and lower case, and a full stop at the end, make no difference.

  Args:
    chat: the model.
    rows: LLaVA rows from `read_rows`. Each value of their field `kind` gets its own score.
    folder: the folder of the annotation file; paths in the field `video` are relative to it.
    max_frames: the most frames to encode of a video.
    on_answer: is called after each answer with the row, its question, the model's answer, the true
      answer, and whether they agree.

  Returns:
    The score of each kind, and of "all" rows.

  Raises:
    InputError: a video cannot be used.
  """
  scores = defaultdict(Score)
  path, video = None, None
  by_video = sorted(rows, key=lambda row: row["video"])  # encode each video once
  for row in tqdm(by_video, "answering", unit="row", leave=False, disable=None):
    if row["video"] != path:
      path = row["video"]
      video = chat.watch(folder / path, max_frames, progress=False)
    video.reset()
    question, truth = (turn.text for turn in turns_of_row(row))
    question = _without_placeholder(question)
    answer = video.ask(question)
    right = _normalise(answer) == _normalise(truth)
    for kind in {"all", row.get("kind", "all")}:
      scores[kind].rows += 1
      scores[kind].right += right
    on_answer(row, question, answer, truth, right)
  return dict(scores)


def read_rows(annotations: Path) -> list[dict]:
  """Reads and checks an annotation file.

  Args:
    annotations: a file of LLaVA rows, each with one question and its answer: a list (.json) or one
      row on each line (.jsonl). The field `video` is a path relative to the file.

  Raises:
    InputError: the file is missing, is not JSON or is empty; or a row has no `video`, has a `kind`
      that is not text, or has not exactly one question with its answer.
  """
  try:
    text = annotations.read_text("utf-8")
    if annotations.suffix == ".jsonl":
      rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
      rows = json.loads(text)
  except OSError as error:
    raise InputError(f"{annotations}: cannot be read ({error.strerror}); check the path") from error
  except (ValueError, RecursionError) as error:
    raise InputError(f"{annotations}: not valid JSON ({error}); correct the file") from error
  if not isinstance(rows, list) or not rows:
    raise InputError(f"{annotations}: has no list of rows; write such a file with `vcflash synth`")
  for number, row in enumerate(rows):
    _check_row(row, f"{annotations}: row {number}")
  return rows


def _check_row(row, where):
  if not isinstance(row, dict) or not isinstance(row.get("video"), str):
    raise InputError(f"{where} has no field 'video' with text; add the path of the video")
  if not isinstance(row.get("kind", ""), str):
    raise InputError(f"{where}: field 'kind' is not text; write a text or remove the field")
  try:
    turns = turns_of_row(row)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  if [turn.role for turn in turns] != ["human", "gpt"]:
    raise InputError(
      f"{where} needs one question and one answer in 'conversations'; correct the row"
    )
  if not _without_placeholder(turns[0].text):
    raise InputError(f"{where}: the question in 'conversations' is empty; write a question")


def _without_placeholder(question):
  return question.replace(PLACEHOLDER, "").strip()


def _normalise(text):
  return text.strip().rstrip(".").lower()
