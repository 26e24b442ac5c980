"""Share of an annotation file's questions whose answer is right, word for word."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from videochat_flash_jax.data.conversation import PLACEHOLDER, turns_of_row
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
  annotations: Path,
  max_frames: int | None = None,
  on_answer: Callable[[dict, str, bool], None] = lambda row, answer, right: None,
) -> dict[str, Score]:
  """Asks every row's question, each in a conversation of its own.

  Args:
    chat: the model.
    annotations: a JSON list of LLaVA rows with one question and one answer each; `video` is
      relative to the file. A row's `kind`, if any, gets a score of its own.
    max_frames: the most frames to look at.
    on_answer: told each row, the model's answer, and whether it is right.

  Returns:
    The score of each kind, and of "all".

  Raises:
    InputError: the file or a row cannot be used.
  """
  scores = defaultdict(Score)
  rows = sorted(read_rows(annotations), key=lambda row: row["video"])  # watch each video once
  path, video = None, None
  for row in tqdm(rows, "answering", unit="row", leave=False, disable=None):
    if row["video"] != path:
      path = row["video"]
      video = chat.watch(annotations.parent / path, max_frames, progress=False)
    video.reset()
    question, truth = (turn.text for turn in turns_of_row(row))
    answer = video.ask(question.replace(PLACEHOLDER, "").strip())
    right = _normalise(answer) == _normalise(truth)
    for kind in {"all", row.get("kind", "all")}:
      scores[kind].rows += 1
      scores[kind].right += right
    on_answer(row, answer, right)
  return dict(scores)


def read_rows(annotations: Path) -> list[dict]:
  """Reads and checks an annotation file.

  Raises:
    InputError: it is missing, is no JSON list, is empty, or a row has no video or not exactly one
      question with its answer.
  """
  try:
    rows = json.loads(annotations.read_text("utf-8"))
  except OSError as error:
    raise InputError(f"{annotations}: cannot be read ({error.strerror}); check the path") from error
  except ValueError as error:
    raise InputError(f"{annotations}: not valid JSON ({error}); mend the file") from error
  if not isinstance(rows, list) or not rows:
    raise InputError(f"{annotations}: holds no list of rows; write one with `vcflash synth`")
  for number, row in enumerate(rows):
    if not isinstance(row, dict) or not isinstance(row.get("video"), str):
      raise InputError(f"{annotations}: row {number} has no field 'video'; add the file's path")
    if [turn.role for turn in turns_of_row(row)] != ["human", "gpt"]:
      raise InputError(
        f"{annotations}: row {number} needs one question and one answer in 'conversations'"
      )
  return rows


def _normalise(text):
  return text.strip().rstrip(".").lower()
