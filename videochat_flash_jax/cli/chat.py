"""`vcflash chat`: answers one question about a video or images, or many questions at a prompt."""

import argparse
import sys

from videochat_flash_jax.cli.log import log_to_stderr
from videochat_flash_jax.cli.prompt import lines
from videochat_flash_jax.errors import InputError, is_unicode, one_line

EXAMPLE = 'vcflash chat --model tiny --video match.mp4 --question "What colour is the star?"'

# What other programs call these options, or leave out.
MEANT = {
  "": "--question", "--prompt": "--question", "--query": "--question", "--text": "--question",
  "--path": "--video", "--file": "--video", "--input": "--video", "--images": "--image",
  "--frames": "--max-frames", "--num-frames": "--max-frames", "--max-tokens": "--max-new-tokens",
}  # fmt: skip

_OF_A_VIDEO = ("max_frames", "fps", "start", "end", "window")
_OF_AN_ANSWER = ("max_new_tokens", "temperature", "top_p", "seed")
_HELP = """Type a question, or one of these:
  /video PATH   watch another video in this conversation
  /image PATH   look at another image
  /frames       tell which frames were seen
  /reset        begin a new conversation about the same videos and images
  /quit         end; so does Ctrl-D
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model", default="tiny", help="'tiny', a checkpoint directory, or a released model's name"
  )
  parser.add_argument(
    "--video",
    action="append",
    default=[],
    metavar="PATH",
    help="a video file, its address, or a folder of images, one per frame; may be given several "
    "times",
  )
  parser.add_argument(
    "--image",
    nargs="+",
    action="extend",
    default=[],
    metavar="PATH",
    help="one image, encoded in detail, or several images",
  )
  parser.add_argument(
    "-q", "--question", help="question to answer; without it, type questions at a prompt"
  )
  parser.add_argument("--max-frames", type=int, help="the most frames to encode; a clip has 4")
  parser.add_argument("--fps", type=float, help="the most frames a second to encode")
  parser.add_argument("--start", type=float, metavar="SECONDS", help="watch from here on")
  parser.add_argument("--end", type=float, metavar="SECONDS", help="watch up to here")
  parser.add_argument(
    "--window",
    type=int,
    metavar="FRAMES",
    help="of a video of any length, remember the first 16 and the last frames only, at most so "
    "many in all; when they are full, the oldest quarter is forgotten",
  )
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
    "--weights",
    choices=["int8"],
    help="keep the matrices of the language model in int8; by default as the model has them",
  )
  parser.add_argument(
    "--cache",
    choices=["int8", "int4"],
    help="keep what was read of the video in 8 or 4 bits a value; by default as it is",
  )
  parser.add_argument(
    "--tensor",
    type=int,
    default=1,
    metavar="DEVICES",
    help="number of devices over which the heads, and so the weights and the cache, are split",
  )
  parser.add_argument(
    "--sequence",
    type=int,
    default=1,
    metavar="DEVICES",
    help="number of devices over which the tokens of a video are split; with this or --tensor all "
    "devices are used, and those that are left split the tokens, too",
  )


def run(args: argparse.Namespace) -> None:
  """Encodes the videos and the images, then answers."""
  watching = _checked(args)
  from videochat_flash_jax.inference.chat import VideoChat
  from videochat_flash_jax.inference.fitting import sizes_of
  from videochat_flash_jax.inference.limits import check_tensor, model_card_dropout
  from videochat_flash_jax.parallel.mesh_config import MeshConfig

  log_to_stderr()
  mesh = None
  if args.tensor * args.sequence > 1:
    _check_devices(args.tensor, args.sequence)
    mesh = MeshConfig(tensor=args.tensor, sequence=args.sequence)
  config, is_int8 = sizes_of(args.model)
  check_tensor(config, args.tensor)
  dropout = model_card_dropout(config) if args.dropout else None
  _check_memory(args, config, dropout or config.dropout, "int8" if is_int8 else args.weights)
  chat = VideoChat.from_pretrained(
    args.model,
    context=args.context,
    yarn=args.yarn,
    dropout=dropout,
    mesh=mesh,
    features=args.features,
    weights=args.weights,
    cache=args.cache,
  )
  conversation = chat.conversation()
  for path in args.video:
    conversation.watch(path, **watching)
    _tell(conversation.seen[-1])
  if args.image:
    conversation.look(args.image)
    _tell(f"{', '.join(args.image)}: {conversation.seen[-1]}")
  answering = {name: getattr(args, name) for name in _OF_AN_ANSWER}
  if args.question is not None:
    return _answer(conversation, args.question, answering)
  _tell("Type a question, or /help.")
  for line in lines(sys.stdin):
    try:
      if _is_command(line):
        if not _obey(conversation, line, watching):
          return None
      else:
        _answer(conversation, line, answering)
    except InputError as error:  # for example, it is too long: the conversation continues
      _tell(f"vcflash: {error}")
    except KeyboardInterrupt:
      _tell("(stopped)")
  return None


def _checked(args):
  """Checks what can be checked before a model is loaded; returns how videos are watched."""
  from videochat_flash_jax.data.media.image_reader import read_image
  from videochat_flash_jax.data.media.open_source import open_source
  from videochat_flash_jax.inference.sampler import Sampling
  from videochat_flash_jax.models.config import SamplingConfig

  if args.question is not None and not args.question.strip():
    raise InputError("--question is empty; write a question, or leave it out for a prompt")
  if args.question is not None and not is_unicode(args.question):
    raise InputError("--question is not valid UTF-8; write it again")
  if args.question is not None and not (args.video or args.image):
    raise InputError("--question needs something to look at; give --video or --image")
  for name in ("max_new_tokens", "tensor", "sequence"):
    if getattr(args, name) < 1:
      raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
  watching = {name: getattr(args, name) for name in _OF_A_VIDEO}
  watching = {name: value for name, value in watching.items() if value is not None}
  if watching and args.image and not args.video:
    flag = next(iter(watching)).replace("_", "-")
    raise InputError(f"--{flag} counts frames of a video; leave it out with --image")
  Sampling(args.temperature, args.top_p, args.seed).check()
  of_source = {name: value for name, value in watching.items() if name != "window"}
  for path in args.video:
    open_source(path, sampling=SamplingConfig(), **of_source).close()
  for path in args.image:
    read_image(path)
  return watching


def _tell(text):
  """Tells the person something; answers alone go to stdout."""
  print(one_line(text), file=sys.stderr, flush=True)


def _answer(conversation, question, options):
  """Prints an answer piece by piece."""
  try:
    for piece in conversation.ask(question, stream=True, **options):
      print(piece, end="", flush=True)
  finally:
    print(flush=True)


def _is_command(line):
  """Whether a line is for us, and no question."""
  return line.startswith("/") or line.lower() in ("quit", "exit")


def _obey(conversation, line, watching):
  """Does what a command says. Returns whether the prompt goes on."""
  name, _, path = line.lstrip("/").partition(" ")
  path = path.strip()
  if name in ("quit", "exit"):
    return False
  if name == "reset":
    conversation.reset()
    _tell("a new conversation")
  elif name == "frames":
    for seen in conversation.seen:
      _tell(seen)
      times = getattr(seen, "frame_times", ())
      if times:
        _tell("  at " + ", ".join(f"{time:.1f}" for time in times) + " s")
  elif name == "video" and path:
    conversation.watch(path, **watching)
    _tell(conversation.seen[-1])
  elif name == "image" and path:
    conversation.look(path)
    _tell(f"{path}: {conversation.seen[-1]}")
  else:
    print(_HELP, file=sys.stderr)
  return True


def _check_devices(tensor, sequence):
  """Refuses a mesh that does not use all devices."""
  import jax

  num_devices = jax.device_count()
  if num_devices % (tensor * sequence):
    raise InputError(
      f"--tensor {tensor} x --sequence {sequence} does not divide the {num_devices} devices here; "
      "change one of them, or leave both out to use one device"
    )


def _check_memory(args, config, dropout, weights):
  """Refuses what does not fit into the memory of the device, before anything is loaded."""
  import jax

  from videochat_flash_jax.inference.fitting import (
    Fitting,
    Setting,
    check_memory,
    device_memory,
  )

  num_bytes = device_memory()
  if num_bytes is None:
    return
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  is_split = args.tensor * args.sequence > 1
  sequence = jax.device_count() // args.tensor if is_split else 1
  setting = Setting(weights, args.cache, dropout, args.tensor, sequence)
  frames = args.window or args.max_frames or config.sampling.max_frames
  if not args.video:
    frames = config.vision.clip_frames
  check_memory(Fitting(config, dtype), frames, setting, num_bytes, jax.device_count())
