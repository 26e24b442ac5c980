"""`vcflash compile`: compiles the program of a config for TPUs, without having any."""

import argparse
import dataclasses
import json

from videochat_flash_jax.cli.config_file import add_config_argument, read_config
from videochat_flash_jax.errors import InputError, one_line

EXAMPLE = "vcflash compile --config configs/stage3_long.py --topology v5e:8x8 --config.rows=16"
TAKES_OVERRIDES = True

# What the error message proposes if a program does not fit.
_TRAINING = (
  "more chips along mesh.sequence or mesh.fsdp, fewer rows, tokens_per_row, clips_per_shard or "
  "tiles_per_shard, fewer trained parts, or a larger slice"
)
_ANSWERING = (
  "more chips along mesh.tensor, fewer rows (questions), tokens_per_row or clips_per_shard, or a "
  "larger slice"
)

_TEXT_TOKENS = 32  # before a video


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the options of the verb to its parser."""
  add_config_argument(parser)
  parser.add_argument(
    "--topology",
    required=True,
    help="a slice of TPUs, such as v5e:4x4; with several (mesh.num_slices), each of them",
  )
  parser.add_argument(
    "--program",
    choices=("train", "prefill", "decode"),
    default="train",
    help="train: a training step; prefill: reading a chunk of 4,096 tokens behind others; decode: "
    "a token of the answers to questions about one video, as many as rows. A video has "
    "tokens_per_row tokens with its text, which include those of clips_per_shard clips",
  )
  parser.add_argument(
    "--frames", type=int, help="of prefill and decode: frames of the video, in place of tokens"
  )
  parser.add_argument("--weights", choices=["int8"], help="of prefill and decode; else bfloat16")
  parser.add_argument(
    "--cache", choices=["int8", "int4"], help="of prefill and decode; else bfloat16"
  )
  parser.add_argument("--table", action="store_true", help="print a row of markdown, not JSON")


def run(args: argparse.Namespace) -> int:
  """Compiles the program and prints what it needs; for a config with stages, once per stage.

  Returns:
    The exit code: 2 if a program does not fit.
  """
  answering = {name: getattr(args, name) for name in ("frames", "weights", "cache")}
  answering = {name: value for name, value in answering.items() if value is not None}
  if args.program == "train" and answering:
    raise InputError(f"--{next(iter(answering))} is for --program prefill or decode; leave it out")
  if answering.get("frames", 1) < 1:
    raise InputError(f"--frames is {args.frames}; give at least 1")
  config = read_config(args.config, args.overrides, example="configs/stage3_long.py")

  # These import JAX, so they come after the config is read.
  from videochat_flash_jax.benchmarks import ahead_of_time
  from videochat_flash_jax.train.config import run_configs, train_settings

  runs = {stage: train_settings(run) for stage, run in run_configs(config).items()}
  ahead_of_time.prepare()
  name = one_line(" ".join([args.config.name, *args.overrides]))
  if args.program != "train":
    name += f" --program {args.program}"
    name += "".join(f" --{option} {value}" for option, value in answering.items())
  slices = {settings.mesh.num_slices for settings in runs.values()}
  devices = {number: ahead_of_time.topology_devices(args.topology, number) for number in slices}
  # All programs are built before the first is compiled, so that every mistake is reported at once.
  programs = {
    stage: _program(args.program, settings, devices[settings.mesh.num_slices], **answering)
    for stage, settings in runs.items()
  }
  reports = {stage: _report(args, runs[stage], *program) for stage, program in programs.items()}
  if args.table:
    for stage, report in reports.items():
      print(ahead_of_time.table_row(f"{name} {stage}".rstrip(), report))
  else:
    body = reports.get("", {"stages": reports})
    print(json.dumps({"config": name, **body}, indent=2))
  return 2 if any("error" in report for report in reports.values()) else 0


def _report(args, settings, program, arguments):
  """Compiles one program: what it needs, or by how much it does not fit."""
  from videochat_flash_jax.benchmarks import ahead_of_time

  remedy = _TRAINING if args.program == "train" else _ANSWERING
  try:
    report = ahead_of_time.report(args.topology, program, arguments, remedy)
  except ahead_of_time.OutOfMemory as error:
    report = error.report
  model = settings.model
  return {"model": model.name, "image_size": model.vision.image_size, **report}


def _program(name, settings, devices, frames=None, **quantised):
  """The jitted program of this name, and the shapes of its arguments."""
  if name == "train":
    from videochat_flash_jax.benchmarks.ahead_of_time import beside_next_batch
    from videochat_flash_jax.train.program import train_program

    program = train_program(settings, devices)
    step = beside_next_batch(program.jitted_step)
    return step, (program.state, program.batch, program.batch)
  from videochat_flash_jax.inference.conversation import MAX_NEW_TOKENS
  from videochat_flash_jax.inference.program_shapes import decode_program, prefill_program
  from videochat_flash_jax.parallel.mesh import make_mesh

  mesh = make_mesh(settings.mesh, devices)
  model = dataclasses.replace(settings.model, dropout=settings.dropout)
  num_tokens, num_clips = settings.tokens_per_row, settings.clips_per_shard
  if frames is not None:
    num_clips = -(-frames // model.vision.clip_frames)
    num_tokens = num_clips * model.clip_tokens + _TEXT_TOKENS
  sizes = {"num_tokens": num_tokens, "num_visual": num_clips * model.clip_tokens, **quantised}
  if name == "prefill":
    return prefill_program(model, mesh, **sizes)
  return decode_program(model, mesh, rows=settings.rows, **sizes, max_new_tokens=MAX_NEW_TOKENS)
