"""`vcflash compile`: the program of a config, compiled for TPUs that are not here."""

import argparse
import json

from videochat_flash_jax.cli.config_file import add_config_argument, read_config

EXAMPLE = "vcflash compile --config configs/stage3_long.py --topology v5e:8x8 --config.rows=16"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the verb's options to its parser."""
  add_config_argument(parser)
  parser.add_argument("--topology", required=True, help="a slice of TPUs, such as v5e:4x4")
  parser.add_argument("--table", action="store_true", help="print a row of markdown, not JSON")


def run(args: argparse.Namespace) -> int:
  """Compiles and prints what it takes; 2 if it does not fit."""
  config = read_config(args.config, args.overrides)

  from videochat_flash_jax.benchmarks import ahead_of_time  # imports JAX: not for a typing error

  ahead_of_time.prepare()
  from videochat_flash_jax.train.program import train_program
  from videochat_flash_jax.train.settings import train_settings

  settings = train_settings(config)
  program = train_program(settings, ahead_of_time.topology_devices(args.topology))
  fits = True
  try:
    result = ahead_of_time.report(args.topology, program.step, (program.state, program.batch))
  except ahead_of_time.OutOfMemory as error:
    result, fits = error.report, False
  name = " ".join([args.config.name, *args.overrides])
  if args.table:
    print(ahead_of_time.table_row(name, result))
  else:
    print(json.dumps({"config": name, "model": settings.model.name, **result}, indent=2))
  return 0 if fits else 2
