"""Compiles programs for TPUs on a machine without TPUs, and reports what they will need.

The compiler for TPUs comes with the extra `tpu` and needs no TPU. The compiled program is the one
that would run on TPUs, so its memory and communication are known before a slice is rented.
"""

import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from videochat_flash_jax.benchmarks.chips import roofline
from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.chips import CHIPS

_EXAMPLES = "v4:2x2x2, v5e:4x4, v5e:8x8, v5p:2x2x1, v5p:4x4x4, v6e:8x8"
_GIB = 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": _GIB, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT])"
# The two messages of the compiler about too little memory; the bytes include arguments and results.
_OUT_OF_MEMORY = (
  re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
  re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


class OutOfMemory(Exception):
  """A program does not fit into the memory of a chip.

  Attributes:
    report: the part of the JSON report about it.
  """

  def __init__(self, report: dict[str, Any]):
    super().__init__(report["error"])
    self.report = report


def prepare():
  """Makes the compiler for TPUs usable without a TPU; to be called before JAX is first used.

  Raises:
    InputError: the compiler is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "the compiler for TPUs is not installed; pip install 'videochat_flash_jax[tpu]', or in a "
      "clone: make test-tpu makes .venv-tpu, which has it"
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
  # Any kind of machine will do; without one the compiler writes complaints on stderr.
  os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-64"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask the metadata server of a cloud
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # The compiled programs never run on this machine, so a cache is of no use.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """The chips of one or more slices such as "v5e:4x4".

  Args:
    name: kind of chip and shape of a slice.
    num_slices: number of such slices, joined by the data-centre network.

  Raises:
    InputError: there is no such slice.
  """
  kind, _, shape = name.partition(":")
  reason = f"kinds are {', '.join(CHIPS)}"
  is_shape = kind in CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", shape)
  if kind in CHIPS and not is_shape:
    reason = f"give the sides of a slice, too; slices of {kind} are {CHIPS[kind].slices()}"
  if is_shape and not CHIPS[kind].has_slice(map(int, shape.split("x"))):
    reason = f"slices of {kind} are {CHIPS[kind].slices()}"
  elif is_shape:
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if shape == "1x1":
      options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:
      options["num_slices"] = num_slices
    try:
      return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = " ".join(str(error).split())
  raise InputError(f"--topology {name}: no such slice ({reason}); give one such as {_EXAMPLES}")


def report(
  topology: str, program: Callable, arguments: Sequence[Any], remedy: str = "a larger slice"
) -> dict[str, Any]:
  """Compiles a jitted function for the chips over which its arguments are sharded.

  Args:
    topology: name of the slice.
    program: a jitted function.
    arguments: shapes with shardings, and static arguments.
    remedy: what to try if the program does not fit.

  Returns:
    A JSON object; see docs/memory.md.

  Raises:
    OutOfMemory: the program does not fit into the memory of a chip.
  """
  chips = _chips(arguments)
  num_slices = len({getattr(chip, "slice_index", 0) for chip in chips})
  head = {"topology": topology, "num_slices": num_slices, "chips": len(chips)}
  start = time.perf_counter()
  lowered = program.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    sizes = memory_wanted(str(error))
    if sizes is None:
      raise
    raise OutOfMemory({**head, **_out_of_memory(*sizes, remedy)}) from None
  seconds = time.perf_counter() - start
  costs = program_costs(compiled.as_text())
  kinds = sorted(costs.counts)
  return {
    **head,
    **_memory(compiled.memory_analysis()),
    "compile_seconds": round(seconds, 1),
    "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "flops": costs.flops,
    "bytes_accessed": costs.num_bytes,
    "collectives": {k: {"count": costs.counts[k], "bytes": costs.sizes[k]} for k in kinds},
    "loops_of_unknown_length": costs.guessed_loops,
    "roofline": roofline(CHIPS[topology.partition(":")[0]], costs),
  }


def beside_next_batch(step: Callable) -> Callable:
  """A training step with the next batch as a further argument, which it does not use.

  During a training run the next batch is copied to the chips while a step runs, so the chips need
  memory for both.

  Args:
    step: jitted, `step(state, batch)`.

  Returns:
    A jitted function (state, batch, next batch).
  """
  return jax.jit(lambda state, batch, _: step(state, batch), donate_argnums=0, keep_unused=True)


def _chips(arguments):
  shapes = (x for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct))
  return next(shapes).sharding.device_set


def memory_wanted(message: str) -> tuple[int, int] | None:
  """Reads the bytes that a program needs and the bytes that a chip has from a compiler's message.

  None if the message is about something else.
  """
  for pattern in _OUT_OF_MEMORY:
    if found := pattern.search(message):
      wanted, wanted_unit, available, unit = found.groups()
      return round(float(wanted) * _UNITS[wanted_unit]), round(float(available) * _UNITS[unit])
  return None


def _memory(stats):
  """Bytes of one chip; results that reuse the memory of arguments count once in the peak."""
  return {
    "argument_bytes": stats.argument_size_in_bytes,
    "temporary_bytes": stats.temp_size_in_bytes,
    "output_bytes": stats.output_size_in_bytes,
    "peak_bytes": stats.peak_memory_in_bytes,
  }


def _out_of_memory(wanted, available, remedy):
  """The part of the report about a program that does not fit."""
  wanted_gib, gib = (f"{size / _GIB:.2f} GiB" for size in (wanted, available))
  # The compiler gives two decimals, too: both numbers may be the same.
  little = "a little more than " if wanted_gib == gib else ""
  return {
    "error": f"out of memory: {little}{wanted_gib} needed per chip, {gib} available; try {remedy}",
    "wanted_bytes": wanted,
    "available_bytes": available,
  }


def table_row(name: str, result: dict[str, Any]) -> str:
  """A report as a row of the tables in docs/memory.md.

  | run | slice | peak GiB | arguments | temporary | Tflop | GB moved | collectives, GB (count) |
  least ms of compute / memory / links (and, with several slices, / data-centre network) |

  Args:
    name: of the run.
    result: from `report`, or `OutOfMemory.report`.
  """
  num_slices = result["num_slices"]
  head = f"| {name} | {f'{num_slices} x ' if num_slices > 1 else ''}{result['topology']} |"
  if "error" in result:
    wanted, available = (result[f"{part}_bytes"] / _GIB for part in ("wanted", "available"))
    return f"{head} does not fit: {wanted:.2f} of {available:.2f} GiB |" + 6 * " |"
  collectives = ", ".join(
    f"{kind} {_short(entry['bytes'] / 1e9)} ({entry['count']:,})"
    for kind, entry in result["collectives"].items()
  )
  gib = [result[f"{part}_bytes"] / _GIB for part in ("peak", "argument", "temporary")]
  parts = ("compute", "memory", "link", "data_centre")[: 3 + (num_slices > 1)]
  least = (result["roofline"][f"{part}_seconds"] for part in parts)
  least = ("?" if seconds is None else _short(1e3 * seconds) for seconds in least)
  return (
    f"{head} {gib[0]:.2f} | {gib[1]:.2f} | {gib[2]:.2f} | "
    f"{_short(result['flops'] / 1e12)} | {_short(result['bytes_accessed'] / 1e9)} | "
    f"{collectives or '-'} | {' / '.join(least)} |"
  )


def _short(number):
  return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
