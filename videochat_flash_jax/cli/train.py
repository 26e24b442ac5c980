"""`vcflash train`: runs a config file."""

import argparse
import logging
import shlex
from pathlib import Path

from videochat_flash_jax.cli.config_file import add_config_argument, read_config
from videochat_flash_jax.errors import one_line

EXAMPLE = "vcflash train --config configs/tiny.py --config.seed=1 --workdir /tmp/tiny"
TAKES_OVERRIDES = True


class _HelpConfig(argparse.Action):
  """Prints the table of all config fields and exits, as --help does with the options."""

  def __init__(self, option_strings, dest, help):
    super().__init__(option_strings, dest, nargs=0, help=help)

  def __call__(self, parser, *_):
    from videochat_flash_jax.train.config import config_table

    print(config_table())
    parser.exit()


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the verb's options to its parser."""
  add_config_argument(parser)
  parser.add_argument(
    "--help-config",
    action=_HelpConfig,
    help="show all fields of a config with their meaning, and exit",
  )
  parser.add_argument(
    "--workdir",
    type=Path,
    required=True,
    help="directory of the run; a run that is there continues",
  )
  several = parser.add_argument_group(
    "several hosts",
    "give the same command on each host; TPU hosts find each other without these options",
  )
  several.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
  several.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
  several.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def run(args: argparse.Namespace):
  """Trains, and prints where the weights are."""
  config = read_config(args.config, args.overrides)

  import jax  # slow to import, and not needed to refuse a mistyped option

  from videochat_flash_jax.parallel.processes import exit_if_peer_fails, join_processes
  from videochat_flash_jax.train.loop import heartbeat_seconds, train

  processes = args.coordinator, args.num_processes, args.process_id
  join_processes(*processes, heartbeat_seconds(config))
  is_first = jax.process_index() == 0
  logging.basicConfig(format="%(message)s", force=True)  # libraries have set up their own
  level = logging.INFO if is_first else logging.WARNING
  logging.getLogger("videochat_flash_jax").setLevel(level)
  with exit_if_peer_fails():
    workdir = train(config, args.workdir)
  if is_first and workdir is not None:
    run = one_line(workdir)
    print(f"the checkpoint is in {run}/checkpoints; to write it as models on the hub are:")
    print(f"vcflash convert --model {shlex.quote(run)} --out DIR --dtype bfloat16")
