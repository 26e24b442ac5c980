"""`vcflash evaluate`: how many of an annotation file's questions a model answers right."""

import argparse
import json
from pathlib import Path

EXAMPLE = "vcflash evaluate --model tiny --annotations synth/annotations.json --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options."""
  parser.add_argument(
    "--model", default="tiny", help="'tiny', a checkpoint directory, or a released model"
  )
  parser.add_argument("--annotations", type=Path, required=True, help="JSON list of LLaVA rows")
  parser.add_argument("--max-frames", type=int, help="the most frames to look at")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
  """Answers every row and prints the score."""
  from videochat_flash_jax.evals.exact_match import evaluate, read_rows
  from videochat_flash_jax.inference.chat import VideoChat

  rows = read_rows(args.annotations)  # a bad file is told before the model is loaded
  wrong = []

  def note(row, question, answer, truth, right):
    if not right:
      wrong.append({"id": row.get("id"), "question": question, "answer": answer, "truth": truth})

  chat = VideoChat.from_pretrained(args.model)
  scores = evaluate(chat, rows, args.annotations.parent, args.max_frames, note)
  report = {
    kind: {"rows": score.rows, "right": score.right, "accuracy": score.accuracy}
    for kind, score in scores.items()
  }
  total = report.pop("all")
  if args.json:
    print(json.dumps({**total, "by_kind": report, "wrong": wrong}))
    return
  for kind, score in (*sorted(report.items()), ("all", total)):
    print(f"{kind:12s} {score['right']:5d} of {score['rows']:5d} right  {score['accuracy']:.1%}")
