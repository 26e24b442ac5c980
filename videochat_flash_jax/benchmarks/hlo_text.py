"""Parses the text of a compiled program (HLO) into computations and their instructions."""

import math
import re
from dataclasses import dataclass

_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(\w+)=(?:%([\w.\-]+)|\{(%[^}]*)\})")


@dataclass(frozen=True)
class ArrayType:
  """Shape of an array, its bytes, and whether it is in a chip's main memory (HBM)."""

  shape: tuple[int, ...]
  num_bytes: int
  in_main_memory: bool


@dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its computation.
    opcode: such as "all-gather" or "fusion".
    arrays: types of its output; several if the output is a tuple.
    operands: names of the instructions whose output it reads.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  arrays: tuple[ArrayType, ...]
  operands: tuple[str, ...]
  attributes: str

  @property
  def num_bytes(self) -> int:
    """Bytes of its output."""
    return sum(array.num_bytes for array in self.arrays)

  @property
  def main_memory_bytes(self) -> int:
    """Bytes of the part of its output that is in a chip's main memory."""
    return sum(array.num_bytes for array in self.arrays if array.in_main_memory)

  def called(self) -> dict[str, list[str]]:
    """Names of the computations that it calls, by role ("body", "calls"...)."""
    return {
      role: [one] if one else _NAME.findall(several)
      for role, one, several in _CALLED.findall(self.attributes)
    }

  def sizes(self, attribute: str) -> list[int]:
    """The list of numbers of an attribute, such as `lhs_contracting_dims={1}`."""
    found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
    return [int(size) for size in found[1].split(",") if size] if found else []


@dataclass(frozen=True)
class Computation:
  """Instructions by name, in order; `root` is the one whose output is the result."""

  instructions: dict[str, Instruction]
  root: Instruction


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations of a program by name, and the name of the entry computation."""
  computations, entry, name, instructions, root = {}, "", None, {}, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name, instructions, root = header[2], {}, None
      entry = name if header[1] else entry
    elif line == "}" and name is not None:  # a kernel's text has lines that begin with "}"
      computations[name] = Computation(instructions, root)
      name = None
    elif name is not None and (found := _INSTRUCTION.match(line)):
      instruction = _instruction(found[2], found[3])
      instructions[instruction.name] = instruction
      root = instruction if found[1] else root
  return computations, entry


def _instruction(name, rest):
  """Parses `TYPE opcode(operands), attributes`; a TYPE that is a tuple contains parentheses."""
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opcode, _, arguments = rest[end:].lstrip().partition("(")
  stop = _closing("(" + arguments, 0) - 1
  operands = tuple(_NAME.findall(arguments[:stop]))
  if opcode in ("parameter", "constant"):
    attributes = arguments[:stop]
  else:
    attributes = re.sub(r"metadata=\{[^}]*\}", "", arguments[stop + 1 :])
  return Instruction(name, opcode, tuple(_arrays(rest[:end])), operands, attributes)


def _closing(text, start):
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == "(") - (text[index] == ")")
    if depth == 0:
      return index
  raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _arrays(types):
  """The array types in the text of a type; S(1) to S(9) in a layout mean fast memory."""
  for letters, bits, sizes, layout in _ARRAY.findall(types):
    shape = tuple(int(size) for size in sizes.split(",") if size)
    num_bytes = math.ceil(math.prod(shape) * int(bits or 8) / 8) if letters != "token" else 0
    yield ArrayType(shape, num_bytes, re.search(r"S\([1-9]", layout) is None)
