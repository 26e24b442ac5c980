"""Which chip of a slice stands where in a mesh: a ring goes from link to link, and closes.

A ring waits for its slowest hop. So a slice is cut into boxes of as many chips as a ring has, and
a box is gone through as a comb, which ends beside its beginning:

  v5e:4x4 as one ring      as four rings
  15  0  1  2              3 0  3 0
  14  5  4  3              2 1  2 1
  13  6  7  8              3 0  3 0
  12 11 10  9              2 1  2 1
"""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from videochat_flash_jax.errors import InputError


def chip_grid(shape: tuple[int, int, int, int], chips: Sequence[jax.Device]) -> np.ndarray:
  """Arranges the chips of one slice along data, fsdp, sequence and tensor.

  Neighbours along `sequence`, and its ends, are linked if it is even, the slice can be cut into its
  boxes, and `tensor` is 1. Else JAX arranges the chips: close to each other, not always linked.

  Raises:
    InputError: JAX cannot.
  """
  by_place, (*_, sequence, tensor) = _by_place(chips), shape
  box = _box(by_place.shape, sequence) if by_place is not None and tensor == 1 else None
  if box is not None:
    return np.array([_comb(b) for b in _comb(_cut(by_place, box))]).reshape(shape)
  try:
    return mesh_utils.create_device_mesh(shape, chips, allow_split_physical_axes=True)
  except (TypeError, NotImplementedError, ValueError) as error:
    sizes = " x ".join(map(str, shape))
    raise InputError(
      f"mesh: data x fsdp x sequence x tensor of {sizes} cannot be laid over the links of a slice "
      f"of {len(chips)} chips ({' '.join(str(error).split())}); change a size or the slice"
    ) from error


def _by_place(chips):
  """The chips in an array of three axes, as they are linked; None if they do not fill a box."""
  places = [getattr(chip, "coords", None) for chip in chips]
  if None in places:
    return None
  first = np.min(places, axis=0)
  sides = np.max(places, axis=0) - first + 1
  if len({tuple(place) for place in places}) < len(chips) or math.prod(sides) != len(chips):
    return None
  grid = np.empty(sides, object)
  for chip, place in zip(chips, places, strict=True):
    grid[tuple(place - first)] = chip
  return grid


def _box(sides, num_chips):
  """Sides of the most compact boxes into which a slice can be cut, with a closed way through each.

  There is one through an even number of chips that do not stand in a row.
  """
  divisors = ([n for n in range(1, side + 1) if side % n == 0] for side in sides)
  boxes = [b for b in itertools.product(*divisors) if math.prod(b) == num_chips]
  boxes = [b for b in boxes if num_chips == 2 or (num_chips % 2 == 0 and max(b) < num_chips)]
  return min(boxes, key=sum, default=None)


def _cut(grid, box):
  """An array of boxes, each an array of chips."""
  boxes = np.empty([side // part for side, part in zip(grid.shape, box, strict=True)], object)
  for place in np.ndindex(boxes.shape):
    parts = zip(place, box, strict=True)
    boxes[place] = grid[tuple(slice(p * side, (p + 1) * side) for p, side in parts)]
  return boxes


def _comb(box):
  """Goes through an array of three axes, from each item to one beside it, and back if it can."""
  even_first = sorted(range(3), key=lambda axis: (box.shape[axis] == 1, box.shape[axis] % 2))
  box = box.transpose(even_first).copy()
  if box.shape[2] > 1:  # a snake through two axes is one
    box[1::2] = box[1::2, ::-1].copy()
    box = box.reshape(-1, box.shape[2])
  else:
    box = box[..., 0]
  # To and fro beside the first column, and back along it.
  box[1::2, 1:] = box[1::2, :0:-1].copy()
  return [*box[:, 1:].flat, *box[::-1, 0]]
