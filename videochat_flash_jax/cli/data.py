"""`vcflash data`: checks, converts, indexes and encodes annotations before a training run."""

import argparse
import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from videochat_flash_jax.data.batches.data_config import SAMPLINGS, ReadingConfig
from videochat_flash_jax.errors import InputError, one_line

EXAMPLE = "vcflash data check mixture.yaml --all"
TAKES_OVERRIDES = True  # of the config that `check` may be given


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the actions of the verb, and the options of each action, to its parser."""
  actions = parser.add_subparsers(title="actions", metavar="<action>", required=True)

  def add(run_action, name, text):
    """Adds one action and returns its parser."""
    action = actions.add_parser(
      name, help=text, description=text, allow_abbrev=False, formatter_class=parser.formatter_class
    )
    action.set_defaults(run_action=run_action)
    return action

  check = add(
    _check, "check", "Read every annotation, open media files, and report what is broken."
  )
  check.add_argument("mixture", help="a mixture (.yaml) or one annotation file (.json, .jsonl)")
  check.add_argument("--all", action="store_true", help="open all videos and images")
  check.add_argument(
    "--sample", type=int, default=16, help="number of rows per source whose media are opened"
  )
  check.add_argument("--json", action="store_true", help="print one JSON object")
  check.add_argument(
    "--config",
    type=Path,
    help="config file of a run, which tells what is too long; --config.FIELD=VALUE changes a field",
  )

  convert = add(_convert, "convert", "Convert a table of questions to checked annotations.")
  convert.add_argument("rows", type=Path, help="a .csv, .json or .jsonl file")
  convert.add_argument(
    "--out", type=Path, required=True, help=".jsonl file to write; it must not exist"
  )

  index = add(_index, "index", "Make the row indices that a training run makes when it starts.")
  index.add_argument("mixture", help="a mixture (.yaml) or one annotation file (.json, .jsonl)")

  encode = add(_encode, "encode", "Store a frozen encoder's features of videos and images.")
  encode.add_argument("mixture", help="a mixture (.yaml) or one annotation file (.json, .jsonl)")
  encode.add_argument(
    "--model", required=True, help="model with the encoder: a directory or a released model"
  )
  encode.add_argument(
    "--out", required=True, help="folder of features; a second run continues there"
  )
  defaults = ReadingConfig()
  encode.add_argument(
    "--frames",
    type=int,
    nargs=2,
    default=defaults.frames,
    metavar=("MIN", "MAX"),
    help="frames of a video",
  )
  encode.add_argument(
    "--sampling",
    default=defaults.sampling,
    choices=SAMPLINGS,
    help="how frames are sampled",
  )


def run(args: argparse.Namespace) -> int | None:
  """Runs the chosen action."""
  if args.overrides and getattr(args, "config", None) is None:
    unknown = " ".join(args.overrides)
    raise InputError(f"unknown argument {unknown}; see `vcflash data --help`")
  return args.run_action(args)


def _check(args) -> int:
  from videochat_flash_jax.data.check.check_report import as_json, as_table, is_broken
  from videochat_flash_jax.data.check.media_check import check_sources
  from videochat_flash_jax.data.mixture.mixture import read_mixture

  if args.sample < 0:
    raise InputError(f"--sample is {args.sample}; give 0 or more")
  mixture, num_sampled = read_mixture(args.mixture), None if args.all else args.sample
  with _reader_of_run(args) as reader:
    reports = check_sources(mixture, num_sampled, reader=reader)
  print(json.dumps(as_json(reports)) if args.json else as_table(reports))
  return int(any(map(is_broken, reports)))


@contextlib.contextmanager
def _reader_of_run(args) -> Iterator:
  """What reads rows in the run of --config; None without it."""
  if args.config is None:
    yield None
    return
  from videochat_flash_jax.cli.config_file import read_config
  from videochat_flash_jax.data.batches.examples import ExampleReader
  from videochat_flash_jax.data.text.tokenizer import load_tokenizer
  from videochat_flash_jax.train.config import data_config, require, run_configs, train_settings
  from videochat_flash_jax.train.workdir import write_hub

  runs = run_configs(read_config(args.config, args.overrides))
  if "" not in runs:
    raise InputError(
      f"--config {args.config}: has the stages {', '.join(runs)}; give the config of one run"
    )
  settings = train_settings(runs[""])
  require(bool(settings.init_from), "init_from", None, "the model of the run, for its tokenizer")
  shards = settings.mesh.sequence
  require(shards > 0, "mesh.sequence", shards, "the number of devices that share a row")
  config = data_config(settings, shards, streams=1)
  with tempfile.TemporaryDirectory() as hub:
    write_hub(Path(hub), settings)
    make_tokenizer = functools.partial(load_tokenizer, hub)
    yield ExampleReader(config.example, config.row_shape, make_tokenizer)


def _convert(args) -> None:
  from videochat_flash_jax.data.mixture.row_conversion import convert_rows

  print(one_line(f"{args.out}: {convert_rows(args.rows, args.out):,} row(s) written"))


def _index(args) -> int:
  from videochat_flash_jax.caches import cache_folder
  from videochat_flash_jax.data.mixture.mixture import read_mixture
  from videochat_flash_jax.data.mixture.row_index import remove_leftovers
  from videochat_flash_jax.data.mixture.rows import INDICES, open_usable_rows

  start, mixture = time.perf_counter(), read_mixture(args.mixture)
  remove_leftovers(cache_folder(INDICES))
  rows, problems = open_usable_rows(mixture)
  if problems and len(mixture.sources) == 1:
    raise InputError(problems[mixture.sources[0]])
  for problem in problems.values():
    print(f"skipped: {problem}")
  if rows:
    print(
      f"{one_line(args.mixture)}: {len(rows):,} row(s) of {len(rows.sources)} file(s) are ready "
      f"after {time.perf_counter() - start:.1f} s; the indices take "
      f"{rows.index_bytes() / 1e6:,.1f} MB"
    )
  return int(bool(problems))


def _encode(args) -> int:
  from videochat_flash_jax.data.batches.data_config import ExampleConfig
  from videochat_flash_jax.data.check.check_report import findings
  from videochat_flash_jax.data.check.media_check import check_roots
  from videochat_flash_jax.data.mixture.mixture import read_mixture
  from videochat_flash_jax.data.mixture.rows import open_rows
  from videochat_flash_jax.inference.chat import VideoChat
  from videochat_flash_jax.inference.feature_encoding import encode_mixture

  rows = open_rows(read_mixture(args.mixture))
  check_roots(rows)
  # Errors in these are raised before many gigabytes are read.
  ExampleConfig(tuple(args.frames), args.sampling, image_size=1)
  chat = VideoChat.from_pretrained(args.model, features=args.out)
  size, tiling = chat.config.vision.image_size, chat.config.tiling
  config = ExampleConfig(tuple(args.frames), args.sampling, image_size=size, tiling=tiling)
  report = encode_mixture(rows, config, chat.engine, chat.features)
  for source in report.sources:
    for line in findings(source):
      print(line)
  print(
    f"{one_line(args.out)}: {report.rows:,} row(s) read, {report.clips:,} new clip(s) and tile(s), "
    f"{report.damaged:,} damaged video(s) among them, {report.broken:,} row(s) skipped; "
    f"{len(chat.features):,} entries in the folder"
  )
  return int(report.broken > 0)
