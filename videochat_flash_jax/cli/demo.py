"""`vcflash demo`: writes a synthetic video, and the embedded model answers questions about it."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from videochat_flash_jax.cli.log import log_to_stderr
from videochat_flash_jax.errors import InputError, one_line

EXAMPLE = "vcflash demo"

_SECONDS = 120
_QUESTIONS = 3
_SEED = 2026  # of a video that was not used in training


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for the video")


def run(args: argparse.Namespace) -> int:
  """Writes the video, encodes it and asks three questions.

  Returns:
    The exit code: 1 if an answer is wrong.
  """
  from videochat_flash_jax.inference.chat import VideoChat
  from videochat_flash_jax.synthetic.world import write_dataset

  log_to_stderr()
  annotations = args.out / "annotations.json"
  if not os.path.exists(annotations):
    write_dataset(args.out, 1, (_SECONDS, _SECONDS), _SEED, questions_per_video=_QUESTIONS + 1)
  path, questions = _questions(annotations)
  asked = questions[:_QUESTIONS]

  print("Times include compilation, where it is announced.")
  video = VideoChat.from_pretrained("tiny").watch(path)
  print(
    f"\n{one_line(path)}: {video.seconds:.0f} s, {video.num_frames} frames, "
    f"watched in {video.watch_seconds:.1f} s"
  )
  num_right = 0
  for question, truth in asked:
    answer = video.ask(question)
    num_right += answer == truth
    print(f"\n  question  {question}\n  answer    {answer}\n  truth     {truth}")
    prefill, decoding = 1000 * video.prefill_seconds, 1000 * video.decode_seconds
    print(f"  prefill {prefill:.0f} ms, decoding {decoding:.0f} ms")
  print(f"\n{num_right} of {len(asked)} right. Ask it yourself:")
  chat = f"{sys.argv[0]} chat --model tiny --video {shlex.quote(one_line(path))}"
  print(f'  {chat} --question "{questions[-1][0]}"')
  return 0 if num_right == len(asked) else 1


def _questions(annotations):
  """Reads a file that this verb has written: its one video, and questions with their answers."""
  from videochat_flash_jax.data.mixture.broken import BrokenRow
  from videochat_flash_jax.data.mixture.mixture import read_mixture
  from videochat_flash_jax.data.mixture.rows import open_rows
  from videochat_flash_jax.evals.exact_match import questions_of_row

  opened = open_rows(read_mixture(annotations))
  try:
    rows = [opened[number] for number in range(len(opened))]
  except BrokenRow:
    rows = []
  video = rows[0].get("video") if rows else None
  if not isinstance(video, str) or any(row.get("video") != video for row in rows):
    raise InputError(f"{annotations}: was not written by `vcflash demo`; give another --out")
  below = os.path.relpath(video, os.path.abspath(annotations.parent))
  return annotations.parent / below, [pair for row in rows for pair in questions_of_row(row)]
