"""`vcflash bench`: measures speed, compared with a peer and with the limits of the machine."""

import argparse
import importlib
import json
import os
from pathlib import Path

from videochat_flash_jax.errors import InputError

EXAMPLE = "vcflash bench merge --json"

BENCHMARKS = {
  "merge": "token merging: 16 clips, 784 to 64 tokens",
  "vit": "video encoder: UMT-L, 2 clips of 4 frames",
  "decode": "decoder: 4 layers of Qwen2 1.5B, prefill of 4096 tokens and decoding of 32",
  "read": "video reading: 64 frames of a 10-minute 1080p file, and short files; takes minutes",
  "pipeline": "batches of long videos: does a training step wait for its batch?",
  "watch": "up to 10,000 frames from a file: decoding, encoding and reading at the same time",
  "prefill": "reading 60,000 visual tokens in chunks, and 8,192 with 4 layers of Qwen2 1.5B",
  "second-question": "later questions about up to 10,000 frames, one by one and eight at once",
  "length": "time and peak memory of 100, 1,000 and 10,000 frames; as the last three, minutes",
}
_THREADS = 2


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the options of the verb to its parser."""
  listing = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
  parser.add_argument("benchmark", choices=BENCHMARKS, help=listing)
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw it, for `length`")


def run(args: argparse.Namespace):
  """Runs one benchmark on at most two cores, and prints its report.

  Raises:
    InputError: the plot cannot be drawn.
  """
  if hasattr(os, "sched_setaffinity"):  # not on macOS
    # This must be set before JAX and torch start their threads: each starts one per core.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_THREADS])
  name = args.benchmark.replace("-", "_")
  module = importlib.import_module(f"videochat_flash_jax.benchmarks.{name}")
  if args.plot is not None and not hasattr(module, "plot"):
    raise InputError(f"--plot: {args.benchmark} draws nothing; give it to `length`")
  if args.plot is not None and not args.plot.parent.is_dir():  # before minutes of measuring
    raise InputError(f"--plot: there is no folder {args.plot.parent}; make it")
  report = module.run()
  if args.plot is not None:
    args.plot.write_text(module.plot(report))
  describe = getattr(module, "summary", summary)  # a benchmark without floors has its own summary
  print(json.dumps(report, indent=2) if args.json else describe(report))


def summary(report: dict) -> str:
  """A report as text, with one line for each phase.

  decode (float32, 2 threads, cpu), median of 3; peer: transformers 5.23.0, torch 2.13.0
    prefill        8.52 s     1.05 x floor (flops)    0.81 x peer (10.5 s)
  """
  peer = f"peer: {report['peer']}" if report["peer"] else report["note"] or "no peer"
  lines = [
    f"{report['name']} ({report['dtype']}, {report['threads']} threads, {report['device']}), "
    f"median of {report['repeats']}; {peer}"
  ]
  for name, phase in report["phases"].items():
    line = f"  {name:<14}{phase['seconds']:8.4g} s   "
    line += f"{phase['ratio_to_floor']:6.2f} x floor ({phase['floor_bound_by']})"
    if phase["peer_seconds"] is not None:
      line += f"   {phase['ratio_to_peer']:6.2f} x peer ({phase['peer_seconds']:.4g} s)"
    lines.append(line)
  return "\n".join(lines)
