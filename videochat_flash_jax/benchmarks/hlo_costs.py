"""What a compiled program does in one run: products, bytes moved, and collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here the text of the compiled program is
walked, and what stands in a loop counts as often as the loop runs. Of the branches of a condition
the most costly one counts.

- flops: of matrix products, convolutions and attention kernels; nothing else comes near them.
- bytes: that instructions read from and write to the chip's main memory. What stays in its fast
  memory (S(1) in the text), or inside of a fusion, is not moved.
- collectives: bytes of the largest array that each one takes or gives.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from videochat_flash_jax.benchmarks.hlo_text import Computation, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Products of queries and keys, or the like of it, that each kernel of ops/splash.py makes.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
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
    # Where a collective runs beside other work, its pieces share a channel: the first one counts.
    self.continued = {
      channel
      for computation in computations.values()
      for instruction in computation.instructions.values()
      if 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes
      for channel in [_channel(computation.instructions[instruction.operands[0]])]
    }

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
      total.add(Costs(inside.flops, 0, inside.counts, inside.sizes, inside.sent))
      total.num_bytes += self._fusion_bytes(instruction, computation, called["calls"][0])
    else:
      total.flops += _flops(instruction, computation)
      total.num_bytes += _moved_bytes(instruction, computation)
      if kind in COLLECTIVES and self._begins(instruction, computation):
        _add_collective(total, kind, instruction, computation)

  def _begins(self, instruction, computation):
    if _channel(instruction) not in self.continued:
      return True
    return any(
      'custom_call_target="AsyncCollectiveStart"' in other.attributes
      and instruction.name in other.operands
      for other in computation.instructions.values()
    )

  def _fusion_bytes(self, instruction, computation, name):
    """Of a fused operand that is only cut, the pieces count; so does a piece written into one."""
    inside = self.computations[name]
    total = 0
    for place, operand in enumerate(instruction.operands):
      array = computation.instructions[operand]
      if array.main_memory_bytes:
        total += min(array.main_memory_bytes, _bytes_used(inside, place))
    results = inside.root.operands if inside.root.opcode == "tuple" else [inside.root.name]
    for result, array in zip(results, instruction.arrays, strict=False):
      source = _behind_bitcasts(inside, inside.instructions[result])
      if array.in_main_memory and source.opcode == "dynamic-update-slice":
        total += inside.instructions[source.operands[1]].num_bytes
      elif array.in_main_memory:
        total += array.num_bytes
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
    return math.ceil((int(bound.attributes) - start) / step)


def _step(body, name):
  source = _behind_copies(body, name)
  if source.opcode == "add":
    for operand in source.operands:
      constant = _behind_copies(body, operand)
      if constant.opcode == "constant":
        return int(constant.attributes)
  return 1


def _start(computation, name, place):
  carried = computation.instructions[name]
  if carried.opcode != "tuple":
    return 0
  source = _behind_copies(computation, carried.operands[place])
  return int(source.attributes) if source.opcode == "constant" else 0


def _behind_copies(computation, name):
  instruction = computation.instructions[name]
  while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _behind_bitcasts(computation, instruction):
  while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands:
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _bytes_used(inside, place):
  """Bytes that a fusion reads of an operand: those of its pieces, if it is only cut."""
  parameters = [i for i in inside.instructions.values() if i.opcode == "parameter"]
  (parameter,) = (i for i in parameters if i.attributes == str(place))
  total = 0
  for user in inside.instructions.values():
    if parameter.name not in user.operands:
      continue
    if user.opcode in ("dynamic-slice", "slice", "gather"):
      total += user.num_bytes
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
      return math.inf
  return total


def _moved_bytes(instruction, computation):
  opcode = instruction.opcode
  operands = [computation.instructions[name] for name in instruction.operands]
  if opcode in _MOVES_NOTHING or opcode.endswith("-done"):
    return 0
  if opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * instruction.main_memory_bytes
  if opcode in ("dynamic-update-slice", "scatter"):
    return 2 * operands[-1 if opcode == "scatter" else 1].main_memory_bytes
  written = instruction.arrays[-1:] if opcode.endswith("-start") else instruction.arrays
  written = sum(array.num_bytes for array in written if array.in_main_memory)
  return written + sum(operand.main_memory_bytes for operand in operands)


def _flops(instruction, computation):
  operands = [computation.instructions[name] for name in instruction.operands]
  if instruction.opcode == "dot":
    left = operands[0].arrays[0].shape
    summed = math.prod(left[axis] for axis in instruction.sizes("lhs_contracting_dims"))
    return 2 * math.prod(instruction.arrays[0].shape) * summed
  if instruction.opcode == "convolution":
    shapes = (*(operand.arrays[0].shape for operand in operands), instruction.arrays[0].shape)
    return _convolution_flops(instruction.attributes, *shapes)
  if instruction.opcode == "custom-call":
    return _kernel_flops(instruction, operands)
  return 0


def _kernel_flops(instruction, operands):
  """Of attention; where it is causal, about half of the blocks are visited."""
  products = [n for name, n in _KERNEL_PRODUCTS.items() if instruction.name.startswith(name)]
  if not products:
    return 0
  shapes = [operand.arrays[0].shape for operand in operands]
  first = next(place for place, shape in enumerate(shapes) if shape[-1] % 8 == 0 and place != 1)
  tables, (queries, keys) = shapes[:first], shapes[first : first + 2]
  seen = (1 + 1 / max(tables[0][-2:])) / 2 if tables else 1
  return products[0] * 2 * math.prod(queries) * keys[-2] * seen


def _convolution_flops(attributes, left, kernel, result):
  """The TPU's compiler writes all products as convolutions, some of them dilated."""
  names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  window = dict(re.findall(r"(\w+)=([\w\-]+)", attributes.partition("window={")[2].split("}")[0]))
  num_pairs = 1
  for axis, letter in enumerate(sorted(c for c in names[1] if c.isdigit())):
    sizes = (
      shape[name.index(letter)]
      for shape, name in zip((left, kernel, result), names.groups(), strict=True)
    )
    num_pairs *= _pairs(*sizes, window, axis)
  batch, summed = left[names[1].index("b")], kernel[names[2].index("i")]
  groups = re.search(r"batch_group_count=(\d+)", attributes)
  batch //= int(groups[1]) if groups else 1
  return 2 * batch * summed * result[names[3].index("f")] * num_pairs


def _pairs(left, kernel, result, window, axis):
  """How many places of the result meet a place of the kernel at a number that is not padding."""

  def option(name, default):
    values = window.get(name)
    return int(values.split("x")[axis].split("_")[0]) if values else default

  place = np.arange(result)[:, None] * option("stride", 1)
  place = place + np.arange(kernel) * option("rhs_dilate", 1) - option("pad", 0)
  dilation = option("lhs_dilate", 1)
  return int(((place >= 0) & (place % dilation == 0) & (place // dilation < left)).sum())


def _add_collective(total, kind, instruction, computation):
  taken = sum(computation.instructions[name].num_bytes for name in instruction.operands)
  given = instruction.num_bytes
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    given = instruction.arrays[-1 if kind != "collective-permute" else 1].num_bytes
  size, members = max(taken, given), _group_size(instruction.attributes)
  share = {"all-reduce": 2.0, "collective-permute": 1.0}.get(kind, 1.0)
  if kind != "collective-permute":
    share *= 1 - 1 / members
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


def _channel(instruction):
  found = re.search(r"channel_id=(\d+)", instruction.attributes)
  return found[1] if found else instruction.name
