"""Converts hub tensors to the arrays of a model, and back.

At any time only one tensor is in the memory of the host.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from videochat_flash_jax.checkpoints.hub.hf_mapping import INT8_VALUES, HubTensor, hub_tensors
from videochat_flash_jax.checkpoints.hub.safetensors_files import (
  BAR,
  FLOATING,
  INT8,
  StoredTensor,
  dtype_name,
  finite_blocks,
  fold_layers,
  refuse_broken,
)
from videochat_flash_jax.errors import InputError

# Returns the sharding of an array, given its path (such as `decoder.norm.scale`) and its shape.
# None means JAX's default device.
ShardingOf = Callable[[str, tuple[int, ...]], Sharding | None]

_GROUP_BYTES = 64 * 2**20  # so much of a stack of layers is read before it is sent to the device
_TILE = (128, 512)  # a transposing copy works on such tiles, which fit into the cache of a core


def load_weights(
  where: Path | str,
  stored: Mapping[str, StoredTensor],
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype | Mapping[str, np.dtype] = np.float32,
  sharding_of: ShardingOf = lambda path, shape: None,
) -> dict[str, jax.Array]:
  """Reads every array of a model; uses every stored tensor exactly once.

  Stacked arrays are filled on the device. So the host never holds more than one tensor, or
  `_GROUP_BYTES` of smaller ones, in `dtype`.

  Args:
    where: the checkpoint, for error messages.
    stored: tensors by their names on the hub.
    shapes: shape of every array of the model by its path, such as `decoder.norm.scale`.
    dtype: dtype of all returned arrays, or a mapping from path to dtype.
    sharding_of: returns the sharding of an array, given its path and shape.

  Returns:
    The arrays by their paths.

  Raises:
    InputError: tensors are missing, unexpected, have another shape or another kind of dtype: one
      message names all of them. Or tensors hold NaN or infinity: these are named after all have
      been read.
  """
  tensors = hub_tensors(dict(shapes), stored)
  check_tensors(where, stored, tensors)
  types = {path: np.dtype(dtype[path] if isinstance(dtype, Mapping) else dtype) for path in shapes}
  broken, arrays = [], {}
  total = sum(types[path].itemsize * int(np.prod(shape)) for path, shape in shapes.items())
  with tqdm(desc="loading", total=total, **BAR) as bar:

    def fill(array: np.ndarray, tensor: HubTensor):
      """Reads a tensor into an array of ours, block by block."""
      rows, start = tensor.conversion.to_hub(array), 0  # a view of our array with the hub's axes
      for block in finite_blocks(tensor.name, stored[tensor.name], types[tensor.path], broken):
        _copy(rows[start : start + len(block)], block)
        start += len(block)
        bar.update(block.nbytes)

    for path, parts in itertools.groupby(tensors.values(), lambda tensor: tensor.path):
      shape = tuple(shapes[path])
      sharding = sharding_of(path, shape)
      arrays[path] = _read_array(list(parts), shape, types[path], sharding, fill)
  refuse_broken(where, broken)
  return arrays


def _read_array(parts, shape, dtype, sharding, fill):
  """Reads one array to its devices: from one tensor, or from the tensors of its layers."""
  if parts[0].layer is None:
    whole = np.empty(shape, dtype)
    fill(whole, parts[0])
    return _to_devices(whole, sharding)
  layer_bytes = dtype.itemsize * int(np.prod(shape[1:]))
  layers_at_once = max(1, _GROUP_BYTES // layer_bytes)
  stack = None
  for start in range(0, len(parts), layers_at_once):
    group = np.empty((min(layers_at_once, len(parts) - start), *shape[1:]), dtype)
    for layer, part in zip(group, parts[start:], strict=False):
      fill(layer, part)
    if len(group) == len(parts):
      return _to_devices(group, sharding)
    if stack is None:
      stack = jnp.zeros(shape, dtype, device=sharding)
    layers = _to_devices(group, _layers_sharding(sharding))
    stack = jax.block_until_ready(_layer_writer(stack.sharding)(stack, layers, start))
  return stack


def _to_devices(array, sharding):
  """Copies an array to its devices, and waits until that is done.

  Without the wait, the next array would be read while this one still takes memory on the host.
  """
  if sharding is None:
    return jax.block_until_ready(jax.device_put(array))
  make_array = functools.partial(jax.make_array_from_callback, array.shape, sharding)
  return jax.block_until_ready(make_array(lambda index: array[index]))


def _layers_sharding(sharding):
  """The sharding of a few layers of a stack: that of the stack, but not split along the layers."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))


@functools.cache
def _layer_writer(sharding):
  """A program that writes layers into a stack in place, and keeps the sharding of the stack."""
  return jax.jit(
    lambda stack, layers, start: jax.lax.dynamic_update_slice_in_dim(stack, layers, start, 0),
    donate_argnums=0,
    out_shardings=sharding,
  )


def hub_arrays(weights: Mapping[str, jax.Array]) -> dict[str, StoredTensor]:
  """Returns the hub tensors that hold the arrays of a model.

  Args:
    weights: arrays by their paths.

  Returns:
    Tensors by their names on the hub. An array is copied to the host when its tensor is read.
  """
  tensors = hub_tensors({path: array.shape for path, array in weights.items()})
  return {
    name: StoredTensor(
      tensor.shape,
      dtype_name(weights[tensor.path].dtype),
      functools.partial(_hub_blocks, weights[tensor.path], tensor),
    )
    for name, tensor in tensors.items()
  }


def _hub_blocks(array, tensor) -> Iterator[np.ndarray]:
  ours = tensor.conversion.to_hub(
    np.asarray(array if tensor.layer is None else array[tensor.layer])
  )
  theirs = np.empty(ours.shape, ours.dtype)
  _copy(theirs, ours)
  yield theirs


def _copy(target, source):
  """`target[...] = source`, but several times faster if one of them is transposed."""
  if target.ndim != 2 or target.flags.c_contiguous == source.flags.c_contiguous:
    target[...] = source
    return
  rows, columns = _TILE
  for i in range(0, target.shape[0], rows):
    for j in range(0, target.shape[1], columns):
      target[i : i + rows, j : j + columns] = source[i : i + rows, j : j + columns]


def check_tensors(
  where: Path | str, stored: Mapping[str, StoredTensor], tensors: Mapping[str, HubTensor]
) -> None:
  """Compares the stored tensors of a checkpoint with those that a model needs.

  Args:
    where: the checkpoint, for error messages.
    stored: the stored tensors.
    tensors: the tensors of the model. Both are given by their names on the hub.

  Raises:
    InputError: names all stored tensors that do not fit.
  """
  known = {name: tensor for name, tensor in stored.items() if name in tensors}
  found = {
    "missing": [name for name in tensors if name not in stored],
    "unexpected": sorted(stored.keys() - tensors.keys()),
    "of another shape": [
      f"{name} (is {tensor.shape}, should be {tensors[name].shape})"
      for name, tensor in known.items()
      if tensor.shape != tensors[name].shape
    ],
    f"of another dtype than {', '.join(FLOATING)}": [
      f"{name} (is {tensor.dtype})"
      for name, tensor in known.items()
      if not tensors[name].path.endswith(INT8_VALUES) and tensor.dtype not in FLOATING
    ],
    f"of another dtype than {INT8}": [
      f"{name} (is {tensor.dtype})"
      for name, tensor in known.items()
      if tensors[name].path.endswith(INT8_VALUES) and tensor.dtype != INT8
    ],
  }
  problems = [f"{what}: {', '.join(fold_layers(names))}" for what, names in found.items() if names]
  if problems:
    raise InputError(
      f"{where}: the tensors do not fit config.json; {'; '.join(problems)}; "
      "download the checkpoint again, or correct its config.json"
    )
