"""Weights in int8, for inference: how a checkpoint gets them.

Int8 are the matrices of the decoder: kernels of linear layers, the embedding and the head. On the
hub such a weight is two tensors; w is about `values * scale`:

  model.layers.0.mlp.up_proj.weight        I8   [out, in]  -127 to 127 (or -128)
  model.layers.0.mlp.up_proj.weight_scale  F32  [out, 1]   one for each output, or vocabulary id
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint
from videochat_flash_jax.checkpoints.hub.hf_mapping import RULES, SCALE_OF_INT8, may_be_int8
from videochat_flash_jax.checkpoints.hub.hf_options import INT8_FIELD, has_int8
from videochat_flash_jax.checkpoints.hub.safetensors_files import (
  FLOATING,
  INT8,
  StoredTensor,
  finite_blocks,
  refuse_broken,
)
from videochat_flash_jax.parallel.sharding import dotted_path

_PIECE_VALUES = 2**23  # so many are quantised at a time: 32 MiB in float32


def int8_shapes(weights: Mapping[str, Any]) -> Any:
  """The shapes of a model's weights, where those of int8 weights are `qwix.QArray`s.

  Args:
    weights: nested dicts of shapes, from the root of the model. A kernel [L, D, M] gets scales
      [L, 1, M], the embedding [vocab, D] gets [vocab, 1].
  """

  def in_int8(path, leaf):
    """The shapes of one weight."""
    path = dotted_path(path)
    if not may_be_int8(path):
      return leaf
    summed = leaf.ndim - (1 if path.endswith("embedding") else 2)
    scales = tuple(1 if axis == summed else size for axis, size in enumerate(leaf.shape))
    return qwix.QArray(
      jax.ShapeDtypeStruct(leaf.shape, jnp.int8), jax.ShapeDtypeStruct(scales, leaf.dtype)
    )

  return jax.tree_util.tree_map_with_path(in_int8, weights)


def in_int8(checkpoint: Checkpoint) -> Checkpoint:
  """The same checkpoint with int8 weights. They are made when they are read, a few rows at a time.

  Reading them raises InputError if a wide tensor holds NaN or infinity.
  """
  if has_int8(checkpoint.fields):
    return checkpoint
  names = [name for name, path, _ in RULES if may_be_int8(path)]
  tensors = {}
  for name, tensor in checkpoint.tensors.items():
    if tensor.dtype in FLOATING and any(re.fullmatch(regex, name) for regex in names):
      rows = _Int8Rows(checkpoint.where, name, tensor)
      tensors[name] = StoredTensor(tensor.shape, INT8, rows.values)
      tensors[name + SCALE_OF_INT8] = StoredTensor((*tensor.shape[:1], 1), "F32", rows.scales)
    else:
      tensors[name] = tensor
  return checkpoint._replace(tensors=tensors, fields={**checkpoint.fields, **INT8_FIELD})


class _Int8Rows:
  """The rows of a wide tensor in int8.

  The scales, few numbers, are kept when the values are read. So whoever reads values first reads
  the wide tensor only once.
  """

  def __init__(self, where: Path | str, name: str, tensor: StoredTensor):
    self._where, self._name, self._wide, self._scales = where, name, tensor, None

  def values(self) -> Iterator[np.ndarray]:
    """Pieces of the values, int8 [rows, in]."""
    wide, broken, scales = dataclasses.replace(self._wide, blocks=self._pieces), [], []
    for piece in finite_blocks(self._name, wide, np.dtype(np.float32), broken):
      refuse_broken(self._where, broken)
      rows = _quantise(piece)
      scales.append(np.asarray(rows.scale))
      yield np.asarray(rows.qvalue)
    self._scales = scales

  def scales(self) -> Iterator[np.ndarray]:
    """Pieces of the scales, float32 [rows, 1]."""
    if self._scales is None:
      for _ in self.values():
        pass
    yield from self._scales

  def _pieces(self):
    for block in self._wide.blocks():
      yield from np.array_split(block, 1 + block.size // _PIECE_VALUES)


@jax.jit
def _quantise(rows):
  return qwix.quantize(rows, jnp.int8, channelwise_axes=(0,))
