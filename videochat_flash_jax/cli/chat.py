"""`vcflash chat`: answers one question about a video or images, or many questions at a prompt."""

import argparse
import logging

from videochat_flash_jax.errors import InputError, is_unicode, one_line

EXAMPLE = 'vcflash chat --model tiny --video match.mp4 --question "What colour is the star?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model", default="tiny", help="'tiny', a checkpoint directory, or a released model's name"
  )
  seen = parser.add_mutually_exclusive_group(required=True)
  seen.add_argument("--video", help="a video file, or a folder of images, one per frame")
  seen.add_argument(
    "--image",
    nargs="+",
    action="extend",
    metavar="PATH",
    help="one image, encoded in detail, or several images",
  )
  parser.add_argument(
    "--question", help="question to answer; without it, type questions at a prompt"
  )
  parser.add_argument("--max-frames", type=int, help="the most frames to encode; a clip has 4")
  parser.add_argument(
    "--max-new-tokens", type=int, default=256, help="the most tokens of an answer"
  )
  parser.add_argument(
    "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
  )
  parser.add_argument(
    "--top-p",
    type=float,
    default=1.0,
    help="sample from the most likely tokens whose probabilities sum to this",
  )
  parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
  parser.add_argument("--context", type=int, help="the most tokens of prompt and answer together")
  parser.add_argument(
    "--yarn", type=float, metavar="FACTOR", help="stretch the context by this factor"
  )
  parser.add_argument(
    "--dropout",
    action="store_true",
    help="drop visual tokens as the model cards propose; needs more than 18 decoder layers",
  )
  parser.add_argument(
    "--features",
    metavar="FOLDER",
    help="folder that keeps the encoder's output, so that a video is encoded only once",
  )
  parser.add_argument(
    "--tensor",
    type=int,
    default=1,
    metavar="DEVICES",
    help="number of devices over which the model is sharded",
  )


def run(args: argparse.Namespace) -> None:
  """Encodes the video or the images, then answers."""
  if args.question is not None and not args.question.strip():
    raise InputError("--question is empty; write a question, or leave it out for a prompt")
  if args.question is not None and not is_unicode(args.question):
    raise InputError("--question is not valid UTF-8; write it again")
  if args.max_new_tokens < 1:
    raise InputError(f"--max-new-tokens is {args.max_new_tokens}; give at least 1")
  if args.image and args.max_frames is not None:
    raise InputError("--max-frames counts frames of a video; leave it out with --image")
  from videochat_flash_jax.inference.chat import VideoChat
  from videochat_flash_jax.inference.sampler import Sampling
  from videochat_flash_jax.models.config import DropoutConfig
  from videochat_flash_jax.parallel.mesh_config import MeshConfig

  Sampling(args.temperature, args.top_p, args.seed).check()  # before a long video is encoded

  logging.basicConfig(format="%(message)s")
  logging.getLogger("videochat_flash_jax").setLevel(logging.INFO)
  dropout = DropoutConfig.model_card() if args.dropout else None
  mesh = None if args.tensor == 1 else MeshConfig(tensor=args.tensor)
  chat = VideoChat.from_pretrained(
    args.model,
    context=args.context,
    yarn=args.yarn,
    dropout=dropout,
    mesh=mesh,
    features=args.features,
  )
  if args.image:
    seen = chat.look(args.image)
    print(one_line(f"{', '.join(args.image)}: {seen.num_tiles} tiles seen"))
  else:
    seen = chat.watch(args.video, args.max_frames)
    print(one_line(f"{args.video}: {seen.seconds:.1f} s, {seen.num_frames} frames seen"))

  def answer(question):
    """Prints the answer piece by piece."""
    pieces = seen.ask(
      question,
      stream=True,
      max_new_tokens=args.max_new_tokens,
      temperature=args.temperature,
      top_p=args.top_p,
      seed=args.seed,
    )
    for piece in pieces:
      print(piece, end="", flush=True)
    print()

  if args.question is not None:
    return answer(args.question)
  print("Type a question; quit, exit or Ctrl-D ends.")
  for question in _questions():
    try:
      answer(question)
    except InputError as error:  # for example, it is too long: the conversation continues
      print(f"vcflash: {error}")


def _questions():
  """Yields the questions that are typed, until the end; empty lines are skipped."""
  while True:
    try:
      question = input("> ").strip()
    except EOFError:
      return
    if question.lower() in ("quit", "exit"):
      return
    if question:
      yield question
