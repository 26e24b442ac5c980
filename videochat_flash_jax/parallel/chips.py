"""What TPU chips can do at most, and which slices there are, as published.

Source: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (read in 2026). Of the links, what a
chip can send over all of them at once counts: v5e has 1,600 Gbit/s, also published as 400 GB/s for
both directions together. Of the data-centre network, a chip's share: of a v5p 50 Gbit/s; of a pod
of 256 v5e 6.4 Tbit/s, of as many v6e 25.6. Of v4 nothing is published.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

# All slices of chips that are linked in two dimensions; and in three those that are less than a
# cube of 4 x 4 x 4 chips, of which the larger ones are made.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


class Chip(NamedTuple):
  """Published peaks of one chip, and of slices.

  Attributes:
    flops_per_second: bfloat16 operations.
    memory_bytes_per_second: that main memory moves.
    sent_bytes_per_second: over all links.
    data_centre_bytes_per_second: sent to other slices; None if it is not published.
    small_slices: sides of those that are not made of cubes.
    most_chips: of a slice of cubes; 0 if there are none.
  """

  flops_per_second: float
  memory_bytes_per_second: float
  sent_bytes_per_second: float
  data_centre_bytes_per_second: float | None
  small_slices: tuple[tuple[int, ...], ...]
  most_chips: int = 0

  def has_slice(self, sides: Iterable[int]) -> bool:
    """Whether there is a slice with these sides, turned if need be."""
    sides = sorted(sides)
    of_cubes = len(sides) == 3 and all(side > 0 and side % 4 == 0 for side in sides)
    is_small = sides in map(sorted, self.small_slices)
    return is_small or (of_cubes and math.prod(sides) <= self.most_chips)

  def slices(self) -> str:
    """Which slices there are, in words."""
    small = ", ".join("x".join(map(str, sides)) for sides in self.small_slices)
    if not self.most_chips:
      return small
    return f"{small}, and multiples of 4 along three sides, of at most {self.most_chips:,} chips"


CHIPS = {
  "v4": Chip(275e12, 1228e9, 300e9, None, _PARTS_OF_A_CUBE, 4096),
  "v5e": Chip(197e12, 819e9, 200e9, 6.4e12 / 8 / 256, _FLAT),
  "v5p": Chip(459e12, 2765e9, 600e9, 50e9 / 8, _PARTS_OF_A_CUBE, 6144),
  "v6e": Chip(918e12, 1638e9, 400e9, 25.6e12 / 8 / 256, _FLAT),
}

# What JAX calls a device -> its name here; the longest that the name begins with counts.
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
  """Bfloat16 operations a second of a chip that JAX calls so (`device.device_kind`), if known."""
  known = [kind for kind in _DEVICE_KINDS if device_kind.startswith(kind)]
  return CHIPS[_DEVICE_KINDS[max(known, key=len)]].flops_per_second if known else None
