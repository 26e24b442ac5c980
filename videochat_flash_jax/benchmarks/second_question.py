"""`vcflash bench second-question`: a second question, and eight at once, beside the first answer.

The first answer is timed from `watch` on. The video is read once, so that another question costs
its own tokens; and, above a drop that ranks visual tokens by attention to the question, the reading
of those that stay.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.benchmarks.long_videos import (
  NEW_TOKENS,
  QUESTIONS,
  ranked_dropout,
  small_chat,
  write_long_film,
)
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.config import DropoutConfig

FRAMES = 1000, 10_000


class Case(NamedTuple):
  """A model; see `small_chat`."""

  depth: int | None = None
  dropout: DropoutConfig | None = None


CASES = {
  "tiny": Case(),
  "tiny, drop by attention, 1 of 4 layers above": Case(dropout=ranked_dropout(3)),
  "6 layers": Case(6),
  "6 layers, drop by attention, 1 layer above": Case(6, ranked_dropout(5)),
}


def run(
  frames: Sequence[int] = FRAMES, cases: Mapping[str, Case] = CASES, repeats: int = 5
) -> dict[str, Any]:
  """Watches films and asks, with small models.

  Args:
    frames: of each film.
    cases: models.
    repeats: how often the second question and the eight are asked.
  """
  measured = {}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "film.mp4"
    for count in frames:
      write_long_film(path, count)
      measured[str(count)] = {
        name: _measure(small_chat(*case), path, count, repeats) for name, case in cases.items()
      }
  return {
    "name": "second-question",
    "threads": usable_cores(),
    "repeats": repeats,
    "new_tokens": NEW_TOKENS,
    "frames": measured,
  }


def summary(report: dict[str, Any]) -> str:
  """A report as text, with two lines for each film and model.

  second-question (2 threads), answers of at most 8 tokens
    10000 frames, tiny
      first answer 42.1 s, the second 0.2 s (0.47 %), one alone 0.19 s, eight 0.31 s (1.63 x one)
  """
  lines = [
    f"second-question ({report['threads']} threads), answers of at most {report['new_tokens']} "
    "tokens"
  ]
  for count, cases in report["frames"].items():
    for name, found in cases.items():
      lines += [
        f"  {count} frames, {name}",
        f"    first answer {found['first_seconds']:.3g} s, the second "
        f"{found['second_seconds']:.3g} s ({found['percent_of_first']:.2f} %), one alone "
        f"{found['one_seconds']:.3g} s, eight {found['eight_seconds']:.3g} s "
        f"({found['times_one']:.2f} x one)",
      ]
  return "\n".join(lines)


def _measure(chat: VideoChat, path: Path, num_frames: int, repeats: int) -> dict[str, float]:
  """Times one film and one model. All is done once before, to compile."""
  _ask(chat, path, num_frames, 1)
  first, second, one, eight = _ask(chat, path, num_frames, repeats)
  return {
    "first_seconds": first,
    "second_seconds": second,
    "percent_of_first": 100 * second / first,
    "one_seconds": one,
    "eight_seconds": eight,
    "times_one": eight / one,
  }


def _ask(chat, path, num_frames, repeats):
  """Seconds of the first answer, of a second one, and of one question and eight as a batch."""
  start = time.perf_counter()
  video = chat.watch(path, max_frames=num_frames, progress=False)
  video.ask(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
  first, later = time.perf_counter() - start, []
  for _ in range(repeats):
    video.reset()
    video.ask(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    times = []
    for questions in (QUESTIONS[1], QUESTIONS[:1], QUESTIONS):
      start = time.perf_counter()
      video.ask(questions, max_new_tokens=NEW_TOKENS)
      times.append(time.perf_counter() - start)
      video.reset()
    later.append(times)
  return first, *map(statistics.median, zip(*later, strict=True))
