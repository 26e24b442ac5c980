"""What chips can do at most, and how many TPUs there are in a slice, as published.

Sources: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (read in 2026). Of the links, what a
chip can send over all of them at once counts: v5e has 1,600 Gbit/s, also published as 400 GB/s for
both directions together.
"""

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple


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
