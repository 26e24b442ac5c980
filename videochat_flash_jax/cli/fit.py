"""`vcflash fit`: tells from sizes alone whether a model and a video fit into a chip's memory."""

import argparse
import itertools
import json

from videochat_flash_jax.errors import InputError

EXAMPLE = "vcflash fit --model VideoChat-Flash-Qwen2-7B_res224 --chip v5e --frames 10000"
_GIB = 2**30
_MOST_REMEDIES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the verb to its parser."""
  parser.add_argument(
    "--model", required=True, help="a released model's name, 'tiny', or a directory"
  )
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--chip", help="kind of TPU, such as v5e")
  where.add_argument("--memory", type=float, metavar="GIB", help="memory of another device, in GiB")
  parser.add_argument("--frames", type=int, default=512, help="frames of the video to watch")
  parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
  parser.add_argument("--weights", choices=["int8"], help="as for `vcflash chat`")
  parser.add_argument("--cache", choices=["int8", "int4"], help="as for `vcflash chat`")
  parser.add_argument("--dropout", action="store_true", help="as for `vcflash chat`")
  parser.add_argument("--tensor", type=int, default=1, help="as for `vcflash chat`")
  parser.add_argument("--sequence", type=int, default=1, help="as for `vcflash chat`")
  parser.add_argument("--context", type=int, help="as for `vcflash chat`")
  parser.add_argument("--yarn", type=float, metavar="FACTOR", help="as for `vcflash chat`")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
  """Adds up the memory, and prints the verdict.

  Returns:
    The exit code: 1 if it does not fit.
  """
  for name in ("frames", "tensor", "sequence", "context"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise InputError(f"--{name} is {getattr(args, name)}; give at least 1")
  if args.yarn is not None and not 1 <= args.yarn < 1e6:
    raise InputError(f"--yarn is {args.yarn:g}; give a factor of 1 or more, such as 4.0")
  if args.memory is not None and not 0 < args.memory < 1e6:
    raise InputError(f"--memory is {args.memory:g}; give the GiB of the device")
  from videochat_flash_jax.inference.chat import with_settings
  from videochat_flash_jax.inference.fitting import Fitting, Setting, sizes_of
  from videochat_flash_jax.inference.limits import check_tensor, model_card_dropout
  from videochat_flash_jax.parallel.chips import CHIPS

  chip = args.chip and args.chip.lower()
  if chip is not None and chip not in CHIPS:
    raise InputError(f"--chip is {args.chip!r:.40}; known are {', '.join(CHIPS)}; or give --memory")
  config, is_int8 = sizes_of(args.model)
  check_tensor(config, args.tensor)
  dropout = model_card_dropout(config) if args.dropout else None
  config = with_settings(config, args.context, args.yarn, dropout)
  context = config.decoder.max_positions
  has = CHIPS[chip].memory_bytes if chip else int(args.memory * _GIB)
  fitting = Fitting(config, args.dtype)
  weights = "int8" if is_int8 else args.weights
  setting = Setting(weights, args.cache, config.dropout, args.tensor, args.sequence)
  needs, tokens = fitting.needs(args.frames, setting), fitting.tokens(args.frames)
  longer_context = f"--context {tokens}" if tokens > context else ""
  report = {
    "model": config.name,
    "chip": chip,
    "frames": args.frames,
    "tokens": tokens,
    "context": context,
    "context_suffices": tokens <= context,
    "memory_suffices": needs.total <= has,
    "fits": needs.total <= has and tokens <= context,
    "has_gib": _gib(has),
    "needs_gib": _gib(needs.total),
    **{f"{name}_gib": _gib(value) for name, value in needs._asdict().items()},
    "most_frames": fitting.most_frames(has, setting),
    "most_frames_of_context": fitting.frames(context),
    "remedies": [],
  }
  if not report["fits"]:
    remedies = [setting]  # only the context does not suffice
    if not report["memory_suffices"]:
      remedies = itertools.islice(fitting.remedies(args.frames, has, setting), _MOST_REMEDIES)
    report["remedies"] = [
      {
        "flags": f"{remedy.flags(setting)} {longer_context}".strip(),
        "needs_gib": _gib(fitting.needs(args.frames, remedy).total),
        "most_frames": fitting.most_frames(has, remedy),
      }
      for remedy in remedies
    ]
  print(json.dumps(report, indent=2) if args.json else summary(report))
  return 0 if report["fits"] else 1


def summary(report: dict) -> str:
  """A report as text.

  VideoChat-Flash-Qwen2-7B_res224, 10,000 frames (160,512 tokens): does not fit
    needs 25.1 of 15.8 GiB on each device: weights 15.2, cache 8.6, working memory 1.2
    at most 1,020 frames fit into the memory, and 2,016 into the context of 32,768 tokens
    with --weights int8 --cache int8 --context 160512 it fits: 13.9 GiB; the memory would ...
  """
  fits = "fits" if report["fits"] else "does not fit"
  parts = ", ".join(
    f"{name} {report[key]:.1f}"
    for name, key in (
      ("weights", "weights_gib"), ("cache", "cache_gib"), ("working memory", "working_gib")
    )
  )  # fmt: skip
  lines = [
    f"{report['model']}, {report['frames']:,} frames ({report['tokens']:,} tokens): {fits}",
    f"  needs {report['needs_gib']:.1f} of {report['has_gib']:.1f} GiB on each device: {parts}",
    f"  at most {report['most_frames']:,} frames fit into the memory, and "
    f"{report['most_frames_of_context']:,} into the context of {report['context']:,} tokens",
  ]
  for remedy in report["remedies"]:
    lines.append(
      f"  with {remedy['flags']} it fits: {remedy['needs_gib']:.1f} GiB; the memory holds up to "
      f"{remedy['most_frames']:,} frames"
    )
  if not report["context_suffices"]:
    lines.append("  beyond the context of training answers get worse; --yarn helps")
  if not report["fits"] and not report["remedies"]:
    fewer = "fewer frames, or " if report["most_frames"] else ""
    lines.append(f"  no setting makes it fit: give {fewer}a device with more memory")
  return "\n".join(lines)


def _gib(num_bytes):
  return round(num_bytes / _GIB, 3)
