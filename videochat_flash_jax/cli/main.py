"""The command line: `vcflash <verb> ...`.

A verb is a line in `VERBS`, and a module of this folder with

  EXAMPLE                 a command that runs; it is shown by `vcflash <verb> --help`
  add_arguments(parser)   adds the options of the verb to its argparse parser
  run(args)               does the work; returns an exit code, or None for 0
  TAKES_OVERRIDES = True  optional: options that argparse does not know are not errors; they are
                          put into `args.overrides` in their order (`train` gives them to
                          ml_collections)
  MEANT = {"--for": "--of"}  optional: options that other programs have, and what they are here;
                          "" stands for a word without an option

Only the module of the chosen verb is imported, so that `--help` is fast.

Exit codes: 0 success, 2 the user's input cannot be used (one line on stderr), 130 interrupted. Any
other failure is a bug of this package and keeps its traceback.
"""

import argparse
import difflib
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import videochat_flash_jax
from videochat_flash_jax.caches import cache_folder
from videochat_flash_jax.errors import InputError, one_line

VERBS = {
  "chat": "Ask questions about a video, or about images.",
  "demo": "See the embedded model answer questions about a video.",
  "evaluate": "Count the right answers to the questions of an annotation file.",
  "synth": "Write synthetic videos, with questions and their answers.",
  "data": "Check, convert, index and encode annotations.",
  "train": "Train a model from a config file.",
  "fit": "Tell whether a model and a video fit into the memory of a chip.",
  "compile": "Compile a config's program for TPUs, on a machine without TPUs.",
  "convert": "Write a checkpoint, or join one from parts, in the layout of the hub.",
  "bench": "Measure speed, compared with a peer and with the machine's limits.",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
  """Shows the default values of options, and keeps the line breaks of the epilog."""

  def _get_help_string(self, action):
    shown = action.default is not None and action.default is not False
    return super()._get_help_string(action) if shown else action.help


class _Parser(argparse.ArgumentParser):
  """An argument parser that raises `InputError`, so that its errors are one line as all others."""

  def error(self, message: str) -> NoReturn:
    """Raises the error that argparse has found."""
    raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit code.

  Args:
    argv: arguments after the program's name, by default the process's own.
  """
  # The cache keeps compiled programs for the next command; JAX reads these when it is imported.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("programs")))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  _take_any_text()
  try:
    code = _run_verb(list(sys.argv[1:] if argv is None else argv))
    if sys.stdout is not None:
      sys.stdout.flush()  # while its errors still have a message
    return code
  except InputError as error:
    print(f"vcflash: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:  # the reader of our output has ended, as in `vcflash ... | head`
    _silence_stdout()
    return 1
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      print(f"vcflash: {one_line(error.filename)}: the name is too long", file=sys.stderr)
      return 2
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    try:
      sys.stdout.flush()  # another file is full: what was printed is kept
    except OSError:
      _silence_stdout()
    where = error.filename or "the output"
    print(f"vcflash: no space is left for {one_line(where)}; make room for it", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("vcflash: interrupted", file=sys.stderr)
    return 130


def _silence_stdout():
  """Lets Python end without another error of what could not be written."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _take_any_text():
  """Lets the terminal show what its encoding lacks, and read what is not in its encoding."""
  for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
    if isinstance(stream, io.TextIOWrapper):  # a program that calls `main` may have another object
      stream.reconfigure(errors=errors)


def _run_verb(argv: list[str]) -> int:
  """Parses `argv` and runs its verb; only the parser of the chosen verb gets its options."""
  parser = _Parser(
    prog="vcflash", description="Watch hours of video and answer questions about them."
  )
  version = f"vcflash {videochat_flash_jax.__version__}"
  parser.add_argument("--version", action="version", version=version)
  verb_parsers = parser.add_subparsers(title="verbs", metavar="<verb>", required=True)
  for verb, description in VERBS.items():
    verb_parsers.add_parser(
      verb,
      help=description,
      description=description,
      allow_abbrev=False,  # a part of an option's name is an error, as for config fields
      formatter_class=_Help,
    )
  if not argv or argv[0].startswith("-"):
    parser.parse_args(argv)  # exits after --help and --version
    parser.error("give the verb first")

  module = _verb_module(argv[0])
  verb_parser = verb_parsers.choices[argv[0]]
  verb_parser.epilog = f"example:\n  {module.EXAMPLE}"
  module.add_arguments(verb_parser)
  meant = getattr(module, "MEANT", {})
  try:
    args, unknown = parser.parse_known_args(argv)
  except InputError:
    for name in {word.partition("=")[0] for word in argv[1:] if word.startswith("--")}:
      if near := _near(name, verb_parser, meant):  # misspelt: then another one seems to be missing
        verb_parser.error(f"unknown argument {one_line(name):.60}{near}")
    raise
  if getattr(module, "TAKES_OVERRIDES", False):
    args.overrides = unknown
  elif unknown:
    name = unknown[0].partition("=")[0] if unknown[0].startswith("-") else ""
    near = _near(name, verb_parser, meant)
    verb_parser.error(f"unknown argument {one_line(name or unknown[0]):.60}{near}")
  return module.run(args) or 0


def _near(name: str, parser: argparse.ArgumentParser, meant: dict[str, str]) -> str:
  """A hint which option may be meant by a name that is none; "" without any such option."""
  options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", parser.format_help()))
  near = [meant[name]] if name in meant else difflib.get_close_matches(name, options, n=2)
  return f"; did you mean {' or '.join(near)}?" if near and name not in options else ""


def _verb_module(verb: str) -> ModuleType:
  """Imports the module of a verb; the error for an unknown verb proposes similar verbs."""
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the verbs are {', '.join(VERBS)}"
    raise InputError(f"unknown verb {verb!r:.80}: {hint}")
  return importlib.import_module(f"videochat_flash_jax.cli.{verb}")
