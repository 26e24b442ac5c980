"""What TPU chips can do at most, and which slices there are, as published; how long costs take.

Source: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (read in 2026). Of the links, what a
chip can send over all of them at once counts: v5e has 1,600 Gbit/s, also published as 400 GB/s for
both directions together. Of the data-centre network, a chip's share: of a v5p 50 Gbit/s; of a pod
of 256 v5e 6.4 Tbit/s, of as many v6e 25.6. Of v4 nothing is published.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from videochat_flash_jax.benchmarks.hlo_costs import BETWEEN_SLICES, Costs

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


def roofline(chip: Chip, costs: Costs) -> dict[str, float | str | None]:
  """The least seconds that each kind of work takes at the peaks; a step takes the longest of them.

  A lower bound and an estimate: no program reaches all peaks, and links are taken as if all of a
  chip's were used at once. What is sent to other slices takes None where no peak is published.
  """
  between = costs.sent[BETWEEN_SLICES]
  seconds = {
    "compute_seconds": costs.flops / chip.flops_per_second,
    "memory_seconds": costs.num_bytes / chip.memory_bytes_per_second,
    "link_seconds": (sum(costs.sent.values()) - between) / chip.sent_bytes_per_second,
  }
  estimate = "an estimate"
  if between and chip.data_centre_bytes_per_second is None:
    estimate += "; how fast such chips send to other slices is not published"
  else:
    seconds["data_centre_seconds"] = between and between / chip.data_centre_bytes_per_second
  longest = max(seconds, key=seconds.get)
  rounded = {name: round(value, 6) for name, value in seconds.items()}
  rounded.setdefault("data_centre_seconds", None)
  return {**rounded, "bound_by": longest.removesuffix("_seconds"), "is": estimate}
