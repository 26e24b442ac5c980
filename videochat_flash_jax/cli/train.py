"""`vcflash train`: runs a config file."""

import argparse
import logging
from pathlib import Path

from videochat_flash_jax.cli.config_file import add_config_argument, read_config

EXAMPLE = "vcflash train --config configs/tiny.py --config.seed=1 --workdir /tmp/tiny"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the verb's options to its parser."""
  add_config_argument(parser)
  parser.add_argument("--workdir", type=Path, required=True, help="directory to write")


def run(args: argparse.Namespace):
  """Trains, and says where the model is."""
  config = read_config(args.config, args.overrides)
  logging.basicConfig(format="%(message)s")
  logging.getLogger("videochat_flash_jax").setLevel(logging.INFO)

  from videochat_flash_jax.train.loop import train  # Imports JAX: not for a mistyped option.

  train(config, args.workdir)
  print(f"the trained model is in {args.workdir / 'export'}")
