"""The least time that a program takes at the published peak speeds of a chip."""

from videochat_flash_jax.benchmarks.hlo_costs import BETWEEN_SLICES, Costs
from videochat_flash_jax.parallel.chips import Chip


def roofline(chip: Chip, costs: Costs) -> dict[str, float | str | None]:
  """The least seconds of each kind of work at the peak speeds; a step takes at least the longest.

  These are estimates of a lower bound: no program reaches all peaks, and we assume that a chip uses
  all its links at the same time. The time of the data-centre network is None if the peak is not
  published.

  Args:
    chip: peak speeds.
    costs: of one run of the program, per chip.

  Returns:
    A JSON object with seconds for each kind of work, and which of them bounds the program.
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
