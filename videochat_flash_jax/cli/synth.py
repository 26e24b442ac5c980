"""`vcflash synth`: writes videos of a synthetic world, with questions and their answers."""

import argparse
from pathlib import Path

from videochat_flash_jax.errors import InputError, one_line
from videochat_flash_jax.synthetic import world as synthetic

EXAMPLE = "vcflash synth --out /tmp/synth --videos 4 --frames 8:64 --seed 7"


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the options of the verb to its parser."""
  parser.add_argument("--out", type=Path, required=True, help="directory to write into")
  parser.add_argument("--videos", type=int, default=50, help="number of videos")
  parser.add_argument(
    "--frames",
    default="8:64",
    metavar="MIN:MAX",
    help="frames of a video, one per second: a multiple of 4 in this range",
  )
  parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files")
  parser.add_argument(
    "--questions",
    default="attribute",
    metavar="KINDS",
    help=f"comma-separated kinds of question: {', '.join(synthetic.QUESTION_KINDS)}",
  )
  parser.add_argument(
    "--questions-per-video",
    type=int,
    default=4,
    help="questions per video (fewer if little happens in it)",
  )


def run(args: argparse.Namespace):
  """Writes `videos/*.mp4` and `annotations.json`, and prints how many."""
  for name, least in (("videos", 1), ("questions_per_video", 1), ("seed", 0)):
    if getattr(args, name) < least:
      flag = name.replace("_", "-")
      raise InputError(f"--{flag} is {getattr(args, name)}: give {least} or more")
  num_rows = synthetic.write_dataset(
    args.out,
    args.videos,
    _frame_range(args.frames),
    args.seed,
    tuple(args.questions.split(",")),
    args.questions_per_video,
  )
  print(one_line(f"{args.out}: {args.videos} video(s) and {num_rows} question(s) written"))


def _frame_range(text: str) -> tuple[int, int]:
  try:
    least, most = (int(part) for part in text.split(":"))
  except ValueError:
    raise InputError(
      f"--frames {text!r:.80} is not MIN:MAX: give two numbers, such as 8:64"
    ) from None
  return least, most
