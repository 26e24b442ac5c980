"""Arranges the chips of a TPU slice in a mesh, so that neighbours in a ring are linked.

A ring is as slow as its slowest hop, so every hop should be one link. A slice is cut into boxes
with as many chips as a ring has. Within a box the ring follows a closed path shaped like a comb.
Each number below is a chip's index in its ring; the last chip is linked to chip 0:

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

  Neighbours along `sequence`, and its first and last chip, are linked if `sequence` is even,
  `tensor` is 1, and the slice can be cut into boxes of `sequence` chips. Otherwise JAX arranges the
  chips: they are close to each other, but not always linked.

  Args:
    shape: sizes of the four axes; their product is the number of chips.
    chips: all chips of the slice.

  Returns:
    The chips in an array of this shape.

  Raises:
    InputError: JAX cannot arrange the chips in this shape.
  """
  grid, (*_, sequence, tensor) = _by_coordinates(chips), shape
  box = _box_sides(grid.shape, sequence) if grid is not None and tensor == 1 else None
  if box is not None:
    boxes = _closed_path(_cut_into_boxes(grid, box))
    return np.array([_closed_path(b) for b in boxes]).reshape(shape)
  try:
    return mesh_utils.create_device_mesh(shape, chips, allow_split_physical_axes=True)
  except (TypeError, NotImplementedError, ValueError) as error:
    sizes = " x ".join(map(str, shape))
    raise InputError(
      f"mesh: data x fsdp x sequence x tensor of {sizes} cannot be arranged on a slice of "
      f"{len(chips)} chips ({' '.join(str(error).split())}); change a size or the slice"
    ) from error


def _by_coordinates(chips):
  """The chips in an array with three axes, in which neighbours are linked.

  None if a chip has no coordinates, or if the chips do not fill a box.
  """
  coordinates = [getattr(chip, "coords", None) for chip in chips]
  if None in coordinates:
    return None
  first = np.min(coordinates, axis=0)
  sides = np.max(coordinates, axis=0) - first + 1
  if len({tuple(xyz) for xyz in coordinates}) < len(chips) or math.prod(sides) != len(chips):
    return None
  grid = np.empty(sides, object)
  for chip, xyz in zip(chips, coordinates, strict=True):
    grid[tuple(xyz - first)] = chip
  return grid


def _box_sides(sides, num_chips):
  """Sides of the most compact box of so many chips that divides the slice and has a closed path.

  A box has a closed path if its number of chips is even and they do not all lie on one line (or if
  there are only two). None if there is no such box.
  """
  divisors = ([n for n in range(1, side + 1) if side % n == 0] for side in sides)
  boxes = [b for b in itertools.product(*divisors) if math.prod(b) == num_chips]
  boxes = [b for b in boxes if num_chips == 2 or (num_chips % 2 == 0 and max(b) < num_chips)]
  return min(boxes, key=sum, default=None)


def _cut_into_boxes(grid, box):
  """Cuts the chips into boxes with sides `box`: an array whose items are arrays of chips."""
  boxes = np.empty([side // part for side, part in zip(grid.shape, box, strict=True)], object)
  for index in np.ndindex(boxes.shape):
    parts = zip(index, box, strict=True)
    boxes[index] = grid[tuple(slice(i * side, (i + 1) * side) for i, side in parts)]
  return boxes


def _closed_path(box):
  """Lists the items of an array with three axes so that each is a neighbour of the one before it.

  The last item is a neighbour of the first, where the sides allow it.
  """
  even_first = sorted(range(3), key=lambda axis: (box.shape[axis] == 1, box.shape[axis] % 2))
  box = box.transpose(even_first).copy()
  if box.shape[2] > 1:  # first merge two axes into one, by going to and fro through them
    box[1::2] = box[1::2, ::-1].copy()
    box = box.reshape(-1, box.shape[2])
  else:
    box = box[..., 0]
  # Go to and fro through all columns but the first, and return through the first: the comb.
  box[1::2, 1:] = box[1::2, :0:-1].copy()
  return [*box[:, 1:].flat, *box[::-1, 0]]
