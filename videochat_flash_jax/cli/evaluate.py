"""`vcflash evaluate`: counts how many questions of an annotation file a model answers right."""

import argparse
import json
from pathlib import Path

EXAMPLE = "vcflash evaluate --model tiny --annotations synth/annotations.json --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model", default="tiny", help="'tiny', a checkpoint directory, or a released model's name"
  )
  parser.add_argument(
    "--annotations", type=Path, required=True, help="LLaVA rows: a .json list, or .jsonl"
  )
  parser.add_argument("--max-frames", type=int, help="the most frames to encode of a video")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
  """Answers the question of every row and prints the scores."""
  from videochat_flash_jax.evals.exact_match import evaluate, read_rows
  from videochat_flash_jax.inference.chat import VideoChat

  rows = read_rows(args.annotations)  # a bad file is reported before the model is loaded
  wrong = []

  def note_wrong(row, question, answer, truth, right):
    """Keeps the answers that are wrong, for the report."""
    if not right:
      wrong.append({"id": row.get("id"), "question": question, "answer": answer, "truth": truth})

  chat = VideoChat.from_pretrained(args.model)
  scores = evaluate(chat, rows, args.annotations.parent, args.max_frames, note_wrong)
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
