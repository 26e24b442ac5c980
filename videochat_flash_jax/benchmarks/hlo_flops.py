"""Arithmetic of single instructions of a compiled program."""

import math
import re

import numpy as np

from videochat_flash_jax.benchmarks.hlo_text import Computation, Instruction

# Products of queries and keys, or the like of it, that each kernel of ops/splash.py makes.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def instruction_flops(instruction: Instruction, computation: Computation) -> float:
  """Two for every multiplication of a product, a convolution or an attention kernel; else 0."""
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
  first = next(place for place in range(len(shapes)) if _are_q_k_v(*shapes[place : place + 3]))
  tables, (queries, keys) = shapes[:first], shapes[first : first + 2]
  seen = (1 + 1 / max(tables[0][-2:])) / 2 if tables else 1
  return products[0] * 2 * math.prod(queries) * keys[-2] * seen


def _are_q_k_v(q, k, v):
  return k == v and len(q) == len(k) and q[-1] == k[-1]


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
