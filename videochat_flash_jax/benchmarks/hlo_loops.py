"""Finds the trip counts of loops in a compiled program."""

import math
import re
from collections.abc import Mapping

from videochat_flash_jax.benchmarks.hlo_text import Computation, Instruction


def trip_count(
  loop: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> int | None:
  """How often the body of a loop runs; None if this is not known.

  The compiler states it, or it follows from a condition `counter < constant`.

  Args:
    loop: a `while` instruction.
    computation: the one that contains the loop.
    computations: all computations of the program by name.
  """
  if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return int(noted[1])
  called = loop.called()
  condition = computations[called["condition"][0]]
  test = condition.root
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  counter, bound = (condition.instructions[name] for name in test.operands)
  index = re.search(r"index=(\d+)", counter.attributes)
  if bound.opcode != "constant" or index is None:
    return None
  body = computations[called["body"][0]]
  step = _step(body, body.root.operands[int(index[1])])
  start = _start(computation, loop.operands[0], int(index[1]))
  if step is None or start is None:
    return None
  return math.ceil((int(bound.attributes) - start) / step)


def _step(body, name):
  """How much each trip adds to a loop's counter; None if this is not a constant."""
  source = _skip_copies(body, name)
  if source.opcode == "add":
    for operand in source.operands:
      constant = _skip_copies(body, operand)
      if constant.opcode == "constant":
        return int(constant.attributes)
  return None


def _start(computation, name, index):
  """The first value of a loop's counter; None if it is not a constant."""
  carried = computation.instructions[name]
  if carried.opcode != "tuple":
    return None
  source = _skip_copies(computation, carried.operands[index])
  return int(source.attributes) if source.opcode == "constant" else None


def _skip_copies(computation, name):
  """The instruction whose value an instruction copies or converts; or that instruction itself."""
  instruction = computation.instructions[name]
  while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    instruction = computation.instructions[instruction.operands[0]]
  return instruction
