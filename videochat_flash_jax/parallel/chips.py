"""Published peak speeds of TPU chips, and the slices that can be rented.

Source: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (read in 2026).
- Links: what a chip can send over all its links at the same time. A v5e has 1,600 Gbit/s, which is
  also published as 400 GB/s for both directions together.
- Memory: what the compiler says is there, in its error about a program that does not fit.
- Data-centre network: the share of one chip. A v5p has 50 Gbit/s. A pod of 256 v5e has 6.4 Tbit/s,
  a pod of 256 v6e 25.6 Tbit/s. For v4 nothing is published.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

# _FLAT: all slices of the chips that are linked in two dimensions. _PARTS_OF_A_CUBE: for chips that
# are linked in three dimensions, the slices smaller than a cube of 4 x 4 x 4 chips. Larger slices
# consist of whole cubes.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_GIB = 2**30
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


class Chip(NamedTuple):
  """Published peak speeds of one kind of chip, and its slices.

  Attributes:
    flops_per_second: bfloat16 operations per second.
    memory_bytes: of main memory (HBM), as far as the compiler uses it.
    memory_bytes_per_second: bytes per second that main memory (HBM) reads and writes.
    sent_bytes_per_second: bytes per second that a chip sends over all its links.
    data_centre_bytes_per_second: bytes per second that a chip sends to other slices; None if this
      is not published.
    small_slices: sides of the slices that do not consist of whole cubes.
    max_chips: chips of the largest slice of cubes; 0 if there are no such slices.
  """

  flops_per_second: float
  memory_bytes: int
  memory_bytes_per_second: float
  sent_bytes_per_second: float
  data_centre_bytes_per_second: float | None
  small_slices: tuple[tuple[int, ...], ...]
  max_chips: int = 0

  def has_slice(self, sides: Iterable[int]) -> bool:
    """Whether there is a slice with these sides, in any order."""
    sides = sorted(sides)
    has_cubes = len(sides) == 3 and all(side > 0 and side % 4 == 0 for side in sides)
    is_small = sides in map(sorted, self.small_slices)
    return is_small or (has_cubes and math.prod(sides) <= self.max_chips)

  def slices(self) -> str:
    """The slices of this kind of chip, as text for an error message."""
    small = ", ".join("x".join(map(str, sides)) for sides in self.small_slices)
    if not self.max_chips:
      return small
    return f"{small}, and multiples of 4 along three sides, of at most {self.max_chips:,} chips"


CHIPS = {
  "v4": Chip(275e12, int(30.75 * _GIB), 1228e9, 300e9, None, _PARTS_OF_A_CUBE, 4096),
  "v5e": Chip(197e12, int(15.75 * _GIB), 819e9, 200e9, 6.4e12 / 8 / 256, _FLAT),
  "v5p": Chip(459e12, int(95.74 * _GIB), 2765e9, 600e9, 50e9 / 8, _PARTS_OF_A_CUBE, 6144),
  "v6e": Chip(918e12, int(31.25 * _GIB), 1638e9, 400e9, 25.6e12 / 8 / 256, _FLAT),
}

# JAX's name of a device -> our name of the chip. The name of a device may begin with several of
# these: the longest one counts.
_DEVICE_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}


def peak_flops(device_kind: str) -> float | None:
  """Bfloat16 operations per second of a chip; None if the chip is not known.

  Args:
    device_kind: `device.device_kind` of JAX, such as "TPU v5 lite".
  """
  known = [kind for kind in _DEVICE_KINDS if device_kind.startswith(kind)]
  return CHIPS[_DEVICE_KINDS[max(known, key=len)]].flops_per_second if known else None
