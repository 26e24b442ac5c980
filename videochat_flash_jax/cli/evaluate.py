"""`vcflash evaluate`: counts how many questions of an annotation file a model answers right."""

import argparse
import dataclasses
import json

from videochat_flash_jax.errors import InputError, one_line

EXAMPLE = "vcflash evaluate --model tiny --annotations synth/annotations.json --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model", default="tiny", help="'tiny', a checkpoint directory, or a released model's name"
  )
  parser.add_argument(
    "--annotations",
    required=True,
    help="one annotation file (.json, .jsonl), or a mixture (.yaml) of them",
  )
  parser.add_argument("--max-frames", type=int, help="the most frames to encode of a video")
  parser.add_argument("--weights", choices=["int8"], help="as for `vcflash chat`")
  parser.add_argument("--cache", choices=["int8", "int4"], help="as for `vcflash chat`")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
  """Answers the questions of every row and prints the scores, then the rows that cannot be used.

  Returns:
    The exit code: 1 if a row cannot be used.
  """
  if args.max_frames is not None and args.max_frames < 1:
    raise InputError(f"--max-frames is {args.max_frames}; give at least 1")
  from videochat_flash_jax.data.check.check_report import as_json, findings
  from videochat_flash_jax.data.mixture.mixture import read_mixture
  from videochat_flash_jax.data.mixture.rows import open_rows
  from videochat_flash_jax.evals.exact_match import evaluate
  from videochat_flash_jax.inference.chat import VideoChat

  wrong = []

  def note_wrong(row, question, answer, truth, right):
    """Keeps the answers that are wrong, for the report."""
    if not right:
      wrong.append({"id": row.get("id"), "question": question, "answer": answer, "truth": truth})

  def load():
    """The model that answers."""
    return VideoChat.from_pretrained(args.model, weights=args.weights, cache=args.cache)

  rows = open_rows(read_mixture(args.annotations))
  found = evaluate(rows, load, args.max_frames, note_wrong)
  scores = {
    kind: {**dataclasses.asdict(score), "accuracy": score.accuracy}
    for kind, score in found.scores.items()
  }
  total, checked = scores.pop("all"), as_json(found.sources)
  if args.json:
    print(json.dumps({**checked, **total, "by_kind": scores, "wrong": wrong}))
  else:
    for kind, score in (*sorted(scores.items()), ("all", total)):
      right = f"{score['right']:5d} of {score['questions']:5d} right"
      share = f"  {score['accuracy']:.1%}" if score["questions"] else ""
      print(f"{one_line(kind):12s} {right}{share}")
    for source in found.sources:
      for line in findings(source):
        print(line)
  return int(checked["broken"] > 0)
