"""Share of an annotation file's questions whose answer is right, word for word."""

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
  """Counts of rows and of right answers."""

  rows: int = 0
  right: int = 0

  @property
  def accuracy(self) -> float:
    """Share of right answers; 0 without rows."""
    return self.right / self.rows if self.rows else 0.0


def evaluate(
  chat: VideoChat,
  rows: Sequence[dict],
  folder: Path,
  max_frames: int | None = None,
  on_answer: Callable[[dict, str, str, str, bool], None] = lambda *_: None,
) -> dict[str, Score]:
  """Asks every row's question, each in a conversation of its own.

  Args:
    chat: the model.
    rows: LLaVA rows as `read_rows` gives them. A row's `kind`, if any, gets a score of its own.
    folder: what a row's `video` is relative to: the folder of the annotation file.
    max_frames: the most frames to look at.
    on_answer: told each row, its question, the model's answer, the truth, and whether they agree.

  Returns:
    The score of each kind, and of "all".

  Raises:
    InputError: a video cannot be used.
  """
  scores = defaultdict(Score)
  path, video = None, None
  by_video = sorted(rows, key=lambda row: row["video"])  # watch each video once
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
    annotations: LLaVA rows with one question and one answer each, a list (.json) or one on each
      line (.jsonl); `video` is relative to the file.

  Raises:
    InputError: it is missing, is no JSON, is empty, or a row has no video, a `kind` that is
      no text, or not exactly one question with its answer.
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
    raise InputError(f"{annotations}: not valid JSON ({error}); mend the file") from error
  if not isinstance(rows, list) or not rows:
    raise InputError(f"{annotations}: holds no list of rows; write one with `vcflash synth`")
  for number, row in enumerate(rows):
    _check_row(row, f"{annotations}: row {number}")
  return rows


def _check_row(row, where):
  if not isinstance(row, dict) or not isinstance(row.get("video"), str):
    raise InputError(f"{where} has no field 'video'; add the file's path")
  if not isinstance(row.get("kind", ""), str):
    raise InputError(f"{where}: field 'kind' is no text; write one or leave it out")
  try:
    turns = turns_of_row(row)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  if [turn.role for turn in turns] != ["human", "gpt"]:
    raise InputError(f"{where} needs one question and one answer in 'conversations'")
  if not _without_placeholder(turns[0].text):
    raise InputError(f"{where}: the question in 'conversations' is empty; write what to ask")


def _without_placeholder(question):
  return question.replace(PLACEHOLDER, "").strip()


def _normalise(text):
  return text.strip().rstrip(".").lower()
