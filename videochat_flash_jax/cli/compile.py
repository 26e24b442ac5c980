"""`vcflash compile`: compiles the program of a config for TPUs, without having any."""

import argparse
import json

from videochat_flash_jax.cli.config_file import add_config_argument, read_config
from videochat_flash_jax.errors import one_line

EXAMPLE = "vcflash compile --config configs/stage3_long.py --topology v5e:8x8 --config.rows=16"
TAKES_OVERRIDES = True

# What the error message proposes if a program does not fit.
_TRAINING = (
  "more chips along mesh.sequence or mesh.fsdp, fewer rows, tokens_per_row, clips_per_shard or "
  "tiles_per_shard, fewer trained parts, or a larger slice"
)
_ANSWERING = (
  "more chips along mesh.tensor, fewer rows, tokens_per_row or clips_per_shard, or a larger slice"
)


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
    help="train: a training step; prefill: reading prompts of tokens_per_row tokens, which include "
    "the tokens of clips_per_shard clips; decode: one token after such prompts",
  )
  parser.add_argument("--table", action="store_true", help="print a row of markdown, not JSON")


def run(args: argparse.Namespace) -> int:
  """Compiles the program and prints what it needs; for a config with stages, once per stage.

  Returns:
    The exit code: 2 if a program does not fit.
  """
  config = read_config(args.config, args.overrides, example="configs/stage3_long.py")

  # These import JAX, so they come after the config is read.
  from videochat_flash_jax.benchmarks import ahead_of_time
  from videochat_flash_jax.train.config import run_configs, train_settings

  runs = {stage: train_settings(run) for stage, run in run_configs(config).items()}
  ahead_of_time.prepare()
  name = one_line(" ".join([args.config.name, *args.overrides]))
  if args.program != "train":
    name += f" --program {args.program}"
  slices = {settings.mesh.num_slices for settings in runs.values()}
  devices = {number: ahead_of_time.topology_devices(args.topology, number) for number in slices}
  # All programs are built before the first is compiled, so that every mistake is reported at once.
  programs = {
    stage: _program(args.program, settings, devices[settings.mesh.num_slices])
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


def _program(name, settings, devices):
  """The jitted program of this name, and the shapes of its arguments."""
  if name == "train":
    from videochat_flash_jax.benchmarks.ahead_of_time import beside_next_batch
    from videochat_flash_jax.train.program import train_program

    program = train_program(settings, devices)
    step = beside_next_batch(program.jitted_step)
    return step, (program.state, program.batch, program.batch)
  from videochat_flash_jax.inference.conversation import MAX_NEW_TOKENS
  from videochat_flash_jax.inference.programs import decode_program, prefill_program
  from videochat_flash_jax.parallel.mesh import make_mesh

  model = settings.model
  build = prefill_program if name == "prefill" else decode_program
  return build(
    model,
    make_mesh(settings.mesh, devices),
    rows=settings.rows,
    num_tokens=settings.tokens_per_row,
    num_visual=settings.clips_per_shard * model.clip_tokens,
    max_new_tokens=MAX_NEW_TOKENS,
  )
