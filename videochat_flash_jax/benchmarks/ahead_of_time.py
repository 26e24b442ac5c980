"""Compiles programs for TPUs that are not here, and says what they will need.

The compiler of TPUs comes with the extra `tpu` and needs no TPU. What it makes is what would run
there, so memory and communication are known before a slice is rented.
"""

import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from videochat_flash_jax.benchmarks.chips import CHIPS, roofline
from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.errors import InputError

_EXAMPLES = "v4:2x2x2, v5e:4x4, v5e:8x8, v5p:2x2x1, v5p:4x4x4, v6e:8x8"
_GIB = 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": _GIB}


class OutOfMemory(Exception):
  """A program that does not fit a chip.

  Attributes:
    report: what a JSON report says of it.
  """

  def __init__(self, report: dict[str, Any]):
    super().__init__(report["error"])
    self.report = report


def prepare():
  """Makes the TPU's compiler usable where there is no TPU; before JAX is first used.

  Raises:
    InputError: it is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "the compiler for TPUs is not installed; pip install 'videochat_flash_jax[tpu]', or in a "
      "clone: make test-tpu makes .venv-tpu, which has it"
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no questions to a cloud that this is not in
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # What is compiled here never runs here.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(name: str) -> Sequence[jax.Device]:
  """The chips of a slice such as "v5e:4x4".

  Raises:
    InputError: there is no such slice.
  """
  from jax.experimental import topologies  # imports libtpu

  kind, _, shape = name.partition(":")
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  if re.fullmatch(r"1(x1)+", shape):
    options["chips_per_host_bounds"] = (1, 1, 1)
  usable = kind in CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", shape)
  reason = f"kinds are {', '.join(CHIPS)}"
  if usable:
    try:
      topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
      return topology.devices
    except jax.errors.JaxRuntimeError as error:
      reason = " ".join(str(error).split())
  raise InputError(f"--topology {name}: no such slice ({reason}); give one such as {_EXAMPLES}")


def report(topology: str, program: Callable, arguments: Sequence[Any]) -> dict[str, Any]:
  """Compiles a jitted function for the chips that its arguments are sharded over.

  Args:
    topology: name of the slice.
    program: jitted.
    arguments: shapes, with shardings.

  Returns:
    A JSON object; see docs/memory.md.

  Raises:
    OutOfMemory: it does not fit.
  """
  num_chips = len(jax.tree.leaves(arguments)[0].sharding.device_set)
  head = {"topology": topology, "chips": num_chips}
  start = time.perf_counter()
  lowered = program.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", str(error))
    if found is None:
      raise
    wanted, there = (
      round(float(number) * _UNITS[unit])
      for number, unit in (found.groups()[:2], found.groups()[2:])
    )
    raise OutOfMemory({**head, **_too_much(wanted, there)}) from None
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


def _memory(stats):
  """Bytes of one chip. What is given back in place of what was taken counts once."""
  peak = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )
  return {
    "argument_bytes": stats.argument_size_in_bytes,
    "temporary_bytes": stats.temp_size_in_bytes,
    "output_bytes": stats.output_size_in_bytes,
    "peak_bytes": peak,
  }


def _too_much(wanted, there):
  knobs = "more chips along mesh.sequence or mesh.fsdp, fewer rows or tokens_per_row, fewer trained"
  return {
    "error": f"out of memory: {wanted / _GIB:.1f} GiB a chip wanted, {there / _GIB:.1f} GiB there; "
    f"try {knobs} parts, or a larger slice",
    "wanted_bytes": wanted,
    "available_bytes": there,
  }


def table_row(name: str, result: dict[str, Any]) -> str:
  """A report as a row of the tables in docs/memory.md.

  | run | slice | peak GiB | arguments | temporary | Tflop | GB moved | collectives, GB | seconds |
  """
  if "error" in result:
    return f"| {name} | {result['topology']} | {result['error']} |"
  collectives = ", ".join(
    f"{kind} {entry['bytes'] / 1e9:.2f} ({entry['count']})"
    for kind, entry in result["collectives"].items()
  )
  gib = [result[f"{part}_bytes"] / _GIB for part in ("peak", "argument", "temporary")]
  bound = result["roofline"]
  seconds = " / ".join(f"{bound[f'{part}_seconds']:.2f}" for part in ("compute", "memory", "link"))
  return (
    f"| {name} | {result['topology']} | {gib[0]:.2f} | {gib[1]:.2f} | {gib[2]:.2f} | "
    f"{result['flops'] / 1e12:.1f} | {result['bytes_accessed'] / 1e9:.0f} | {collectives or '-'} | "
    f"{seconds} |"
  )
