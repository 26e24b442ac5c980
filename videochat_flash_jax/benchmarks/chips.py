"""How long the costs of a program take at the published peaks of a chip."""

from videochat_flash_jax.benchmarks.hlo_costs import BETWEEN_SLICES, Costs
from videochat_flash_jax.parallel.chips import Chip


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
