"""What a compiled program does in one run: products, bytes moved, and collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here the text of the compiled program is
walked: a loop's body counts as often as it runs, of a condition's branches the most costly one.
- flops: of matrix products, convolutions and attention kernels; nothing else comes near them.
- bytes: that instructions read from and write to the chip's main memory. What stays in its fast
  memory (S(1) in the text), or inside of a fusion, is not moved.
- collectives: bytes that each one takes or gives, whichever are more: of one array, or of all that
  the compiler joined into one. What is sent to other slices is a kind of its own.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from videochat_flash_jax.benchmarks.hlo_flops import instruction_flops
from videochat_flash_jax.benchmarks.hlo_text import Computation, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # over the data-centre network; written as `send` and `recv`

_MOVES_NOTHING = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("call", "after-all", "partition-id", "iota", "async-start", "async-done", "async-update"),
}


@dataclass
class Costs:
  """Of one chip in one run of a program.

  Attributes:
    flops: two for every multiplication.
    num_bytes: read from and written to main memory.
    counts: how often each kind of collective is run.
    sizes: bytes of each kind.
    sent: bytes of each kind that a chip must at least send to others.
    guessed_loops: loops whose length the text does not tell; they count once.
  """

  flops: float = 0
  num_bytes: float = 0
  counts: Counter = field(default_factory=Counter)
  sizes: Counter = field(default_factory=Counter)
  sent: Counter = field(default_factory=Counter)
  guessed_loops: int = 0

  def add(self, other: "Costs", times: int = 1):
    """Adds so many runs of another program."""
    self.flops += times * other.flops
    self.num_bytes += times * other.num_bytes
    for mine, theirs in zip(self._counters(), other._counters(), strict=True):
      mine.update({kind: times * number for kind, number in theirs.items()})
    self.guessed_loops += other.guessed_loops

  def _counters(self):
    return self.counts, self.sizes, self.sent


def program_costs(text: str) -> Costs:
  """Costs of a program, from `compiled.as_text()`."""
  computations, entry = parse(text)
  return _Walk(computations).costs(entry)


class _Walk:
  def __init__(self, computations: dict[str, Computation]):
    self.computations = computations
    self.known: dict[str, Costs] = {}

  def costs(self, name: str) -> Costs:
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
      length = self._loop_length(instruction, computation)
      total.guessed_loops += length is None
      total.add(self.costs(called["body"][0]), length or 1)
    elif opcode == "conditional":
      branches = [self.costs(name) for role in called.values() for name in role]
      total.add(max(branches, key=lambda costs: (costs.flops, costs.num_bytes)))
    elif opcode in ("call", "async-start"):
      total.add(self.costs((called.get("to_apply") or called["calls"])[0]))
    elif opcode == "fusion":
      inside = self.costs(called["calls"][0])
      if called["calls"][0].startswith("all-reduce-scatter"):
        inside = _as_reduce_scatter(inside)
      total.add(Costs(inside.flops, 0, inside.counts, inside.sizes, inside.sent))
      total.num_bytes += self._fusion_bytes(instruction, computation, called["calls"][0])
    else:
      total.flops += instruction_flops(instruction, computation)
      total.num_bytes += _moved_bytes(instruction, computation)
      if kind in COLLECTIVES and _begins(instruction, computation):
        _add_collective(total, kind, instruction, computation)
      elif opcode == "send" and "xla_megascale" in instruction.attributes:
        _add_sent(total, BETWEEN_SLICES, instruction.arrays[0].num_bytes)

  def _fusion_bytes(self, instruction, computation, name):
    """Of a fused operand that is only cut, the pieces count; so does a piece written into one."""
    inside = self.computations[name]
    total = 0
    for place, operand in enumerate(instruction.operands):
      array = computation.instructions[operand]
      if array.main_memory_bytes:
        total += min(array.main_memory_bytes, self._bytes_read(inside, _parameter(inside, place)))
    results = inside.root.operands if inside.root.opcode == "tuple" else [inside.root.name]
    for result, array in zip(results, instruction.arrays, strict=False):
      source = _behind_bitcasts(inside, inside.instructions[result])
      if array.in_main_memory and source.opcode == "dynamic-update-slice":
        total += inside.instructions[source.operands[1]].num_bytes
      elif array.in_main_memory:
        total += array.num_bytes
    return total

  def _bytes_read(self, inside, name):
    """Bytes that a fusion reads of an operand: those of its pieces, if it is only cut."""
    if name == inside.root.name:
      return math.inf
    total = 0
    for user in inside.instructions.values():
      if name not in user.operands:
        continue
      if user.opcode == "bitcast":
        total += self._bytes_read(inside, user.name)
      elif user.opcode in ("dynamic-slice", "slice", "gather"):
        total += user.num_bytes
      elif user.opcode == "fusion":  # one within another
        within = self.computations[user.called()["calls"][0]]
        total += self._bytes_read(within, _parameter(within, user.operands.index(name)))
      elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
        return math.inf
    return total

  def _loop_length(self, loop, computation):
    """From the compiler's own note, or from a condition `counter < constant`."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
      return int(noted[1])
    called = loop.called()
    condition = self.computations[called["condition"][0]]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, bound = (condition.instructions[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if bound.opcode != "constant" or place is None:
      return None
    body = self.computations[called["body"][0]]
    step = _step(body, body.root.operands[int(place[1])])
    start = _start(computation, loop.operands[0], int(place[1]))
    if step is None or start is None:
      return None
    return math.ceil((int(bound.attributes) - start) / step)


def _as_reduce_scatter(costs):
  """The TPU's fusion of a sum over devices and the piece of it that a device keeps."""
  counts, sizes, sent = (
    Counter({"reduce-scatter": numbers["all-reduce"]}) for numbers in costs._counters()
  )
  sent["reduce-scatter"] /= 2
  return Costs(costs.flops, costs.num_bytes, counts, sizes, sent)


def _step(body, name):
  """By how much a loop's counter rises; None if that is no constant."""
  source = _behind_copies(body, name)
  if source.opcode == "add":
    for operand in source.operands:
      constant = _behind_copies(body, operand)
      if constant.opcode == "constant":
        return int(constant.attributes)
  return None


def _start(computation, name, place):
  """Where a loop's counter starts; None if that is no constant."""
  carried = computation.instructions[name]
  if carried.opcode != "tuple":
    return None
  source = _behind_copies(computation, carried.operands[place])
  return int(source.attributes) if source.opcode == "constant" else None


def _behind_copies(computation, name):
  instruction = computation.instructions[name]
  while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _behind_bitcasts(computation, instruction):
  while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands:
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _parameter(computation, place):
  """Name of a computation's operand."""
  parameters = (i for i in computation.instructions.values() if i.opcode == "parameter")
  return next(i.name for i in parameters if i.attributes == str(place))


def _moved_bytes(instruction, computation):
  opcode = instruction.opcode
  operands = [computation.instructions[name] for name in instruction.operands]
  if opcode in _MOVES_NOTHING or opcode.endswith("-done"):
    return 0
  given = _given(instruction)
  if opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
    read = sum(array.num_bytes for array in given) if operands[0].main_memory_bytes else 0
    return read + sum(array.num_bytes for array in given if array.in_main_memory)
  if opcode in ("dynamic-update-slice", "scatter"):
    return 2 * operands[-1 if opcode == "scatter" else 1].main_memory_bytes
  written = sum(array.num_bytes for array in given if array.in_main_memory)
  return written + sum(operand.main_memory_bytes for operand in operands)


def _given(instruction):
  """What an instruction makes; one that only starts gives its operands back, too."""
  opcode, arrays, num_operands = instruction.opcode, instruction.arrays, len(instruction.operands)
  if opcode == "copy-start":
    return arrays[:1]  # before its operand
  if opcode == "send":
    return ()  # its operand, which is only read
  if opcode == "recv":
    return arrays[:1]  # before its flags
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return arrays[num_operands : 2 * num_operands]  # behind its operands, before its semaphores
  return arrays


def _add_collective(total, kind, instruction, computation):
  taken = sum(computation.instructions[name].num_bytes for name in instruction.operands)
  given = sum(array.num_bytes for array in _given(instruction))
  size, members = max(taken, given), _group_size(instruction.attributes)
  share = 2.0 if kind == "all-reduce" else 1.0
  if kind != "collective-permute":
    share *= 1 - 1 / members
  _add_sent(total, kind, size, share)


def _add_sent(total, kind, size, share=1.0):
  total.counts[kind] += 1
  total.sizes[kind] += size
  total.sent[kind] += size * share


def _group_size(attributes):
  """Devices that take part together, from any of the three ways in which groups are written."""
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return listed[1].count(",") + 1
  if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(counted[1])
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[2]))
  return math.inf  # all devices


def _begins(collective, computation):
  """False for the second and later pieces of a collective that runs beside other work."""
  if "chain_id=" not in collective.attributes:
    return True
  return any(
    collective.name in other.operands and "AsyncCollectiveStart" in other.attributes
    for other in computation.instructions.values()
  )
