"""`vcflash bench`: speed beside a peer and beside the machine's limits, in the same minutes."""

import argparse
import importlib
import json
import os

EXAMPLE = "vcflash bench merge --json"

BENCHMARKS = {
  "merge": "token merging: 16 clips, 784 to 64 tokens",
  "vit": "video encoder: UMT-L, 2 clips of 4 frames",
  "decode": "decoder: 4 layers of Qwen2 1.5B, 4096 tokens read and 32 written",
  "read": "video reading: 64 frames of a 10-minute 1080p file, and short files; takes minutes",
  "pipeline": "batches of long videos: does a step wait for them?",
}
_THREADS = 2


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the verb's options to its parser."""
  listing = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
  parser.add_argument("benchmark", choices=BENCHMARKS, help=listing)
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace):
  """Runs one benchmark, on two cores at most, and prints its report."""
  if hasattr(os, "sched_setaffinity"):  # not on macOS
    # Before JAX and torch start their threads, of which each makes one a core.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_THREADS])
  module = importlib.import_module(f"videochat_flash_jax.benchmarks.{args.benchmark}")
  report = module.run()
  describe = getattr(module, "summary", summary)  # a benchmark without floors has its own
  print(json.dumps(report, indent=2) if args.json else describe(report))


def summary(report: dict) -> str:
  """The report in a line for each phase.

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
