"""Counts the flops of single instructions of a compiled program."""

import math
import re

import numpy as np

from videochat_flash_jax.benchmarks.hlo_text import Computation, Instruction

# For each kernel of ops/splash.py, the number of its matrix products that are as large as that of
# queries and keys.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def instruction_flops(instruction: Instruction, computation: Computation) -> float:
  """Flops of a matrix product, a convolution or an attention kernel; 0 for other instructions.

  Every multiplication counts as two flops, since an addition follows.
  """
  operands = [computation.instructions[name] for name in instruction.operands]
  if instruction.opcode == "dot":
    lhs = operands[0].arrays[0].shape
    contracting = math.prod(lhs[axis] for axis in instruction.sizes("lhs_contracting_dims"))
    return 2 * math.prod(instruction.arrays[0].shape) * contracting
  if instruction.opcode == "convolution":
    shapes = (*(operand.arrays[0].shape for operand in operands), instruction.arrays[0].shape)
    return _convolution_flops(instruction.attributes, *shapes)
  if instruction.opcode == "custom-call":
    return _kernel_flops(instruction, operands)
  return 0


def _kernel_flops(instruction, operands):
  """Flops of an attention kernel; 0 for other kernels.

  The operands are tables of blocks (only for causal attention, which visits about half of the
  blocks), then queries, keys and values.
  """
  products = [n for name, n in _KERNEL_PRODUCTS.items() if instruction.name.startswith(name)]
  if not products:
    return 0
  shapes = [operand.arrays[0].shape for operand in operands]
  first = next(index for index in range(len(shapes)) if _are_q_k_v(*shapes[index : index + 3]))
  tables, (queries, keys) = shapes[:first], shapes[first : first + 2]
  visited = (1 + 1 / max(tables[0][-2:])) / 2 if tables else 1  # share of the blocks
  return products[0] * 2 * math.prod(queries) * keys[-2] * visited


def _are_q_k_v(q, k, v):
  return k == v and len(q) == len(k) and q[-1] == k[-1]


def _convolution_flops(attributes, lhs, kernel, result):
  """Flops of a convolution with these shapes of operands and result.

  The TPU's compiler writes all matrix products as convolutions, some of them dilated.
  """
  names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  window = dict(re.findall(r"(\w+)=([\w\-]+)", attributes.partition("window={")[2].split("}")[0]))
  num_pairs = 1
  for axis, letter in enumerate(sorted(c for c in names[1] if c.isdigit())):
    sizes = (
      shape[name.index(letter)]
      for shape, name in zip((lhs, kernel, result), names.groups(), strict=True)
    )
    num_pairs *= _pairs(*sizes, window, axis)
  batch, contracting = lhs[names[1].index("b")], kernel[names[2].index("i")]
  groups = re.search(r"batch_group_count=(\d+)", attributes)
  batch //= int(groups[1]) if groups else 1
  return 2 * batch * contracting * result[names[3].index("f")] * num_pairs


def _pairs(lhs, kernel, result, window, axis):
  """Along one axis, how many pairs (result index, kernel index) read a value of the input.

  Pairs that read padding, or a zero between dilated values, do not count.

  Args:
    lhs: size of the input along the axis.
    kernel: size of the kernel.
    result: size of the result.
    window: stride, padding and dilations, as HLO writes them.
    axis: number of the axis among the spatial axes.
  """

  def option(name, default):
    """A number of the window for this axis."""
    values = window.get(name)
    return int(values.split("x")[axis].split("_")[0]) if values else default

  index = np.arange(result)[:, None] * option("stride", 1)
  index = index + np.arange(kernel) * option("rhs_dilate", 1) - option("pad", 0)
  dilation = option("lhs_dilate", 1)
  return int(((index >= 0) & (index % dilation == 0) & (index // dilation < lhs)).sum())
