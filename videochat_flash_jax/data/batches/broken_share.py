"""Counts the examples whose row could not be read, and stops the run when there are too many.

Examples that are used although something is missing are counted as well: some frames of a damaged
video, or words of an answer that is too long for a training row.
"""

import dataclasses
import logging
from collections import Counter
from typing import Any

from videochat_flash_jax.data.batches.replacement import Drawn
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_MIN_EXAMPLES = 100  # with fewer examples, one broken row says nothing about the others
_MAX_NAMED_SOURCES = 3  # in the error message


@dataclasses.dataclass
class _Counts:
  """Counts of one stream: all examples, damaged ones, cut ones by source, and broken ones.

  The broken ones are counted by source and reason.
  """

  examples: int = 0
  damaged: int = 0
  cut: Counter = dataclasses.field(default_factory=Counter)
  broken: dict[str, Counter] = dataclasses.field(default_factory=dict)


class BrokenShare:
  """Counts examples by stream, source and reason.

  The limit holds for all streams of a process together. A row that is drawn again in another epoch
  is counted again.
  """

  def __init__(self, max_share: float):
    """Starts with all counts at zero; `max_share` is the largest allowed share of broken ones."""
    self._max_share = max_share
    self._streams: dict[int, _Counts] = {}
    self._logged: set[int] = set()
    self._logged_cut: set[str] = set()

  def count(self, drawn: Drawn, stream: int = 0):
    """Counts one example by the reason why its row was broken, and logs each broken row once.

    Of the rows whose answers are cut, only the first one of each source is logged: there may be
    many.

    Raises:
      InputError: there were at least 100 examples, and more than the allowed share were broken. The
        message names the worst sources.
    """
    counts = self._streams.setdefault(stream, _Counts())
    counts.examples += 1
    for row in drawn.skipped:
      if row.row not in self._logged:
        self._logged.add(row.row)
        _log.warning("%s, %s is replaced: %s", row.source, row.label, row.message)
    if drawn.damaged is not None:
      counts.damaged += 1
      if drawn.row not in self._logged:
        self._logged.add(drawn.row)
        _log.warning("%s is damaged, and used as far as it can be read", drawn.damaged)
    if drawn.cut is not None:
      source, label = drawn.cut
      counts.cut[source] += 1
      if source not in self._logged_cut:
        self._logged_cut.add(source)
        _log.warning(
          "%s, %s is longer than a training row, so the end of its answers is cut; other such rows "
          "of this file are only counted (data/cut)",
          *(source, label),
        )
    if drawn.skipped:
      first = drawn.skipped[0]
      counts.broken.setdefault(first.source, Counter())[first.reason] += 1
      self._check()

  @property
  def num_examples(self) -> int:
    """Number of examples counted so far."""
    return sum(counts.examples for counts in self._streams.values())

  @property
  def num_broken(self) -> int:
    """Number of examples counted so far whose row could not be read."""
    return sum(reasons.total() for _, reasons in self._broken())

  def state(self, stream: int = 0) -> dict[str, Any]:
    """Returns the counts of a stream as JSON values.

    The keys are `examples`, `damaged`, `cut` (by source) and `broken` (by source and reason).
    """
    counts = self._streams.get(stream, _Counts())
    broken = {source: dict(reasons) for source, reasons in counts.broken.items()}
    cut = dict(counts.cut)
    return {"examples": counts.examples, "damaged": counts.damaged, "cut": cut, "broken": broken}

  def set_state(self, state: dict[str, Any], stream: int = 0):
    """Restores the counts that `state` returned."""
    broken = {source: Counter(reasons) for source, reasons in state["broken"].items()}
    cut = Counter(state.get("cut", {}))  # earlier versions did not count them
    self._streams[stream] = _Counts(state["examples"], state["damaged"], cut, broken)

  def _broken(self):
    """Pairs of a source and its counts by reason, for all streams."""
    return [pair for counts in self._streams.values() for pair in counts.broken.items()]

  def _check(self):
    if self.num_examples < _MIN_EXAMPLES:
      return
    if self.num_broken <= self._max_share * self.num_examples:
      return
    by_source: dict[str, Counter] = {}
    for source, reasons in self._broken():
      by_source[source] = by_source.get(source, Counter()) + reasons
    worst = sorted(by_source.items(), key=lambda item: -item[1].total())
    named = "; ".join(
      f"{source} {counts.total()} ({', '.join(f'{n} {why}' for why, n in counts.most_common())})"
      for source, counts in worst[:_MAX_NAMED_SOURCES]
    )
    raise InputError(
      f"{self.num_broken} of {self.num_examples} examples could not be read, and max_broken_share "
      f"is {self._max_share:g}: {named}; fix them (vcflash data check lists each one), or set a "
      "larger max_broken_share"
    )
