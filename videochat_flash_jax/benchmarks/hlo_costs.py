"""Counts what a compiled program does in one run: flops, bytes accessed, and collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here we walk through the text of the
compiled program (HLO). The body of a loop counts as often as its trip count says; of the branches
of a conditional, only the most costly one counts.
- flops: of matrix products, convolutions and attention kernels. All other flops are few.
- bytes: read from and written to the chip's main memory (HBM) by instructions. Arrays in the chip's
  fast memory (S(1) in the text), and arrays inside a fusion, do not count.
- collectives: the bytes of operands or of results, whichever are more; if the compiler has joined
  several arrays into one collective, their sum. Bytes sent to other slices are a kind of their own.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from videochat_flash_jax.benchmarks.hlo_flops import instruction_flops
from videochat_flash_jax.benchmarks.hlo_loops import trip_count
from videochat_flash_jax.benchmarks.hlo_text import Computation, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # over the data-centre network; `send` and `recv` in HLO

_ACCESSES_NOTHING = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("call", "after-all", "partition-id", "iota", "async-start", "async-done", "async-update"),
}


@dataclass
class Costs:
  """Costs of one run of a program, per chip.

  Attributes:
    flops: two for every multiplication.
    num_bytes: bytes read from and written to main memory.
    counts: for each kind of collective, how often it runs.
    sizes: for each kind of collective, its bytes.
    sent: for each kind of collective, the bytes that a chip must at least send to other chips.
    guessed_loops: loops whose trip count the text does not state; they are counted as one trip.
  """

  flops: float = 0
  num_bytes: float = 0
  counts: Counter = field(default_factory=Counter)
  sizes: Counter = field(default_factory=Counter)
  sent: Counter = field(default_factory=Counter)
  guessed_loops: int = 0

  def add(self, other: "Costs", times: int = 1):
    """Adds the costs of `times` runs of another program."""
    self.flops += times * other.flops
    self.num_bytes += times * other.num_bytes
    for mine, theirs in zip(self._counters(), other._counters(), strict=True):
      mine.update({kind: times * number for kind, number in theirs.items()})
    self.guessed_loops += other.guessed_loops

  def _counters(self):
    return self.counts, self.sizes, self.sent


def program_costs(text: str) -> Costs:
  """Counts the costs of a program.

  Args:
    text: `compiled.as_text()`, the program in HLO.
  """
  computations, entry = parse(text)
  return _Walk(computations).costs(entry)


class _Walk:
  """Walks through the computations of a program, and through those that they call."""

  def __init__(self, computations: dict[str, Computation]):
    self.computations = computations
    self.known: dict[str, Costs] = {}

  def costs(self, name: str) -> Costs:
    """Costs of one run of a computation; each computation is walked through once."""
    if name not in self.known:
      total = Costs()
      computation = self.computations[name]
      for instruction in computation.instructions.values():
        self._add(total, instruction, computation)
      self.known[name] = total
    return self.known[name]

  def _add(self, total, instruction, computation):
    opcode, called = instruction.opcode, instruction.called()
    kind = opcode.removesuffix("-start")
    if opcode == "while":
      trips = trip_count(instruction, computation, self.computations)
      total.guessed_loops += trips is None
      total.add(self.costs(called["body"][0]), trips or 1)
    elif opcode == "conditional":
      branches = [self.costs(name) for role in called.values() for name in role]
      total.add(max(branches, key=lambda costs: (costs.flops, costs.num_bytes)))
    elif opcode in ("call", "async-start"):
      total.add(self.costs((called.get("to_apply") or called["calls"])[0]))
    elif opcode == "fusion":
      fused = self.costs(called["calls"][0])
      if called["calls"][0].startswith("all-reduce-scatter"):
        fused = _as_reduce_scatter(fused)
      total.add(Costs(fused.flops, 0, fused.counts, fused.sizes, fused.sent))
      total.num_bytes += self._fusion_bytes(instruction, computation, called["calls"][0])
    else:
      total.flops += instruction_flops(instruction, computation)
      total.num_bytes += _accessed_bytes(instruction, computation)
      if kind in COLLECTIVES and _is_first_piece(instruction, computation):
        _add_collective(total, kind, instruction, computation)
      elif opcode == "send" and "xla_megascale" in instruction.attributes:
        _add_sent(total, BETWEEN_SLICES, instruction.arrays[0].num_bytes)

  def _fusion_bytes(self, instruction, computation, name):
    """Bytes that a fusion reads and writes in main memory.

    If a fusion only slices an operand, the bytes of the slices count. If it updates a slice of an
    array, the bytes of the update count.
    """
    fused = self.computations[name]
    total = 0
    for index, operand in enumerate(instruction.operands):
      array = computation.instructions[operand]
      if array.main_memory_bytes:
        total += min(array.main_memory_bytes, self._bytes_read(fused, _parameter(fused, index)))
    results = fused.root.operands if fused.root.opcode == "tuple" else [fused.root.name]
    for result, array in zip(results, instruction.arrays, strict=False):
      source = _skip_bitcasts(fused, fused.instructions[result])
      if array.in_main_memory and source.opcode == "dynamic-update-slice":
        total += fused.instructions[source.operands[1]].num_bytes
      elif array.in_main_memory:
        total += array.num_bytes
    return total

  def _bytes_read(self, fused, name):
    """Bytes that a fused computation reads of its parameter `name`.

    If the parameter is only sliced, the bytes of its slices; otherwise infinity.
    """
    if name == fused.root.name:
      return math.inf
    total = 0
    for user in fused.instructions.values():
      if name not in user.operands:
        continue
      if user.opcode == "bitcast":
        total += self._bytes_read(fused, user.name)
      elif user.opcode in ("dynamic-slice", "slice", "gather"):
        total += user.num_bytes
      elif user.opcode == "fusion":  # a fusion inside a fusion
        inner = self.computations[user.called()["calls"][0]]
        parameter = _parameter(inner, user.operands.index(name))
        is_copy = _skip_bitcasts(inner, inner.root).name == parameter
        total += self._bytes_read(fused if is_copy else inner, user.name if is_copy else parameter)
      elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
        return math.inf
    return total


def _as_reduce_scatter(costs):
  """Costs of the TPU's fusion of an all-reduce with a slice of it: it is a reduce-scatter."""
  counts, sizes, sent = (
    Counter({"reduce-scatter": numbers["all-reduce"]}) for numbers in costs._counters()
  )
  sent["reduce-scatter"] /= 2
  return Costs(costs.flops, costs.num_bytes, counts, sizes, sent)


def _skip_bitcasts(computation, instruction):
  """The instruction in a fusion whose value an instruction copies or converts; or that itself."""
  while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands:
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _parameter(computation, index):
  """Name of the parameter of a computation that has this index."""
  parameters = (i for i in computation.instructions.values() if i.opcode == "parameter")
  return next(i.name for i in parameters if i.attributes == str(index))


def _accessed_bytes(instruction, computation):
  """Bytes that an instruction reads and writes in main memory; fusions are counted elsewhere."""
  opcode = instruction.opcode
  operands = [computation.instructions[name] for name in instruction.operands]
  if opcode in _ACCESSES_NOTHING or opcode.endswith("-done"):
    return 0
  results = _results(instruction)
  if opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
    read = sum(array.num_bytes for array in results) if operands[0].main_memory_bytes else 0
    return read + sum(array.num_bytes for array in results if array.in_main_memory)
  if opcode in ("dynamic-update-slice", "scatter"):
    return 2 * operands[-1 if opcode == "scatter" else 1].main_memory_bytes
  written = sum(array.num_bytes for array in results if array.in_main_memory)
  return written + sum(operand.main_memory_bytes for operand in operands)


def _results(instruction):
  """The arrays that an instruction computes.

  The output of an instruction that only starts an operation also contains its operands; they are
  left out.
  """
  opcode, arrays, num_operands = instruction.opcode, instruction.arrays, len(instruction.operands)
  if opcode == "copy-start":
    return arrays[:1]  # the result, then the operand
  if opcode == "send":
    return ()  # its output is its operand, which is only read
  if opcode == "recv":
    return arrays[:1]  # the result, then flags
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return arrays[num_operands : 2 * num_operands]  # operands, then results, then semaphores
  return arrays


def _add_collective(total, kind, instruction, computation):
  """Adds one run of a collective to the costs."""
  operand_bytes = sum(computation.instructions[name].num_bytes for name in instruction.operands)
  result_bytes = sum(array.num_bytes for array in _results(instruction))
  size, members = max(operand_bytes, result_bytes), _group_size(instruction.attributes)
  share = 2.0 if kind == "all-reduce" else 1.0
  if kind != "collective-permute":
    share *= 1 - 1 / members
  _add_sent(total, kind, size, share)


def _add_sent(total, kind, size, share=1.0):
  """Adds a collective of `size` bytes, of which a chip sends `size * share`."""
  total.counts[kind] += 1
  total.sizes[kind] += size
  total.sent[kind] += size * share


def _group_size(attributes):
  """Number of devices in a group of a collective; HLO writes groups in three ways."""
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return listed[1].count(",") + 1
  if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(counted[1])
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[2]))
  return math.inf  # all devices


def _is_first_piece(collective, computation):
  """Whether a collective counts; the compiler may split one into pieces that run beside other work.

  Only the first piece counts.
  """
  if "chain_id=" not in collective.attributes:
    return True
  return any(
    collective.name in other.operands and "AsyncCollectiveStart" in other.attributes
    for other in computation.instructions.values()
  )
