"""What TPU chips can do at most, and how many there are, as published; how long costs take at that.

Source: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (read in 2026). Of the links, what a
chip can send over all of them at once counts: v5e has 1,600 Gbit/s, also published as 400 GB/s for
both directions together.
"""

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

from videochat_flash_jax.benchmarks.hlo_costs import Costs


class Chip(NamedTuple):
  """Published peaks of one chip, and of slices.

  Attributes:
    flops_per_second: bfloat16 operations.
    memory_bytes_per_second: that main memory moves.
    sent_bytes_per_second: over all links.
    largest_slice: chips along its sides.
  """

  flops_per_second: float
  memory_bytes_per_second: float
  sent_bytes_per_second: float
  largest_slice: tuple[int, ...]

  def has_slice(self, sides: Iterable[int]) -> bool:
    """Whether the largest slice has room for one of these sides, turned if need be."""
    longest_first = zip_longest(
      sorted(sides, reverse=True), sorted(self.largest_slice, reverse=True), fillvalue=1
    )
    return all(side <= largest for side, largest in longest_first)


CHIPS = {
  "v4": Chip(275e12, 1228e9, 300e9, (16, 16, 16)),
  "v5e": Chip(197e12, 819e9, 200e9, (16, 16)),
  "v5p": Chip(459e12, 2765e9, 600e9, (16, 16, 24)),
  "v6e": Chip(918e12, 1638e9, 400e9, (16, 16)),
}


def roofline(chip: Chip, costs: Costs) -> dict[str, float | str]:
  """The least seconds that each kind of work takes at the peaks; a step takes the longest of them.

  A lower bound and an estimate: no program reaches all peaks, and links are taken as if all of a
  chip's were used at once.
  """
  seconds = {
    "compute_seconds": costs.flops / chip.flops_per_second,
    "memory_seconds": costs.num_bytes / chip.memory_bytes_per_second,
    "link_seconds": sum(costs.sent.values()) / chip.sent_bytes_per_second,
  }
  longest = max(seconds, key=seconds.get)
  rounded = {name: round(value, 6) for name, value in seconds.items()}
  return {**rounded, "bound_by": longest.removesuffix("_seconds"), "is": "an estimate"}
