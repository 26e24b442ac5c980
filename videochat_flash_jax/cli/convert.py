"""`vcflash convert`: writes a checkpoint in the layout of the released models."""

import argparse
import contextlib
import os
from pathlib import Path

from videochat_flash_jax.errors import InputError, one_line

EXAMPLE = "vcflash convert --model tiny --to hf --out tiny-hf --dtype bfloat16"

_TYPES = ("bfloat16", "float16", "float32")
_TOWERS = ("umt-large", "umt-hd-large", "internvideo2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model",
    required=True,
    help="'tiny', a checkpoint directory, the WORKDIR of a training run, or a name on the hub; "
    "with --encoder, a Qwen2 model",
  )
  parser.add_argument("--to", choices=["hf"], default="hf", help="the layout to write")
  parser.add_argument(
    "--out", type=Path, required=True, help="directory to write; it must not exist"
  )
  parser.add_argument("--dtype", choices=_TYPES, help="type of the weights; by default unchanged")
  parser.add_argument(
    "--weights",
    choices=["int8"],
    help="write the matrices of the language model in int8, for inference; by default unchanged",
  )
  parser.add_argument(
    "--encoder", type=Path, help="raw .pt file of a video encoder, to join to --model"
  )
  parser.add_argument(
    "--tower", choices=_TOWERS, help="kind of --encoder, which also sets its image size"
  )
  parser.add_argument(
    "--projector", type=Path, help="mm_projector.bin of stage 1; by default random weights"
  )
  parser.add_argument("--seed", type=int, default=0, help="seed of a random projector")


def run(args: argparse.Namespace) -> None:
  """Opens a checkpoint, or joins one from parts, and writes it."""
  if args.encoder is None and (args.projector is not None or args.tower is not None):
    raise InputError("--projector and --tower need --encoder; give it, or leave them out")
  if args.encoder is not None and args.tower is None:
    raise InputError(f"--encoder needs --tower; give one of {', '.join(_TOWERS)}")
  if args.seed < 0:
    raise InputError(f"--seed is {args.seed}; give 0 or more")
  if os.path.lexists(args.out):
    raise InputError(f"--out {args.out}: exists already; give another directory")
  from flax import nnx

  from videochat_flash_jax.checkpoints.convert import open_checkpoint, write_checkpoint
  from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
  from videochat_flash_jax.checkpoints.hub.int8_tensors import in_int8
  from videochat_flash_jax.checkpoints.hub.parts import join_parts
  from videochat_flash_jax.data.text.tokenizer import check_embedded, load_tokenizer
  from videochat_flash_jax.models.videochat_flash import VideoChatFlash

  directory, tokenizer = checkpoint_directory(args.model), None
  if args.encoder is None:
    checkpoint = open_checkpoint(directory)
  else:
    checkpoint = join_parts(directory, args.encoder, args.tower, args.projector, args.seed)
  if args.weights == "int8":
    checkpoint = in_int8(checkpoint)
  with contextlib.suppress(InputError):  # a tokenizer that is not read here goes along unread
    tokenizer = load_tokenizer(checkpoint.directory)
  if tokenizer is not None:
    check_embedded(tokenizer, checkpoint.config.decoder.vocab_size, checkpoint.directory)
  num_bytes = write_checkpoint(
    checkpoint,
    lambda config: VideoChatFlash(config, rngs=nnx.Rngs(0)),
    args.out,
    args.dtype,
  )
  print(one_line(f"{args.out}: {len(checkpoint.tensors)} tensors, {num_bytes:,} bytes"))
