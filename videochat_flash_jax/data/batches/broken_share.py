"""Counts examples whose row could not be read; too many of them stop the run."""

import dataclasses
import logging
from collections import Counter
from typing import Any

from videochat_flash_jax.data.batches.replacement import Drawn
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_LEAST_EXAMPLES = 100  # before these, one broken row says nothing about the others
_NUM_NAMED = 3  # sources in the message


@dataclasses.dataclass
class _Counts:
  """Of one stream: examples, damaged ones among them, and broken ones by source and reason."""

  examples: int = 0
  damaged: int = 0
  broken: dict[str, Counter] = dataclasses.field(default_factory=dict)


class BrokenShare:
  """Counts by stream, source and reason; the limit is for all streams of a process together.

  A row that is drawn again, in another epoch, counts again.
  """

  def __init__(self, most: float):
    """Begins at nothing; `most` is the share of broken examples that is borne."""
    self._most = most
    self._streams: dict[int, _Counts] = {}
    self._logged: set[int] = set()

  def count(self, drawn: Drawn, stream: int = 0):
    """Counts an example under what was wrong with its row, and logs every row once.

    Raises:
      InputError: of at least a hundred examples more than the share borne were broken; names the
        worst sources.
    """
    counts = self._streams.setdefault(stream, _Counts())
    counts.examples += 1
    for row in drawn.passed_over:
      if row.row not in self._logged:
        self._logged.add(row.row)
        _log.warning("%s, %s is replaced: %s", row.source, row.label, row.message)
    if drawn.damaged is not None:
      counts.damaged += 1
      if drawn.row not in self._logged:
        self._logged.add(drawn.row)
        _log.warning("%s is damaged, and used as far as it can be read", drawn.damaged)
    if drawn.passed_over:
      first = drawn.passed_over[0]
      counts.broken.setdefault(first.source, Counter())[first.reason] += 1
      self._check()

  @property
  def num_examples(self) -> int:
    """Examples so far."""
    return sum(counts.examples for counts in self._streams.values())

  @property
  def num_broken(self) -> int:
    """Examples so far whose row could not be read."""
    return sum(reasons.total() for _, reasons in self._broken())

  def state(self, stream: int = 0) -> dict[str, Any]:
    """Fit for JSON: `examples`, `damaged`, and `broken`, counts by source and reason."""
    counts = self._streams.get(stream, _Counts())
    broken = {source: dict(reasons) for source, reasons in counts.broken.items()}
    return {"examples": counts.examples, "damaged": counts.damaged, "broken": broken}

  def set_state(self, state: dict[str, Any], stream: int = 0):
    """Goes on from what `state` gave."""
    broken = {source: Counter(reasons) for source, reasons in state["broken"].items()}
    self._streams[stream] = _Counts(state["examples"], state["damaged"], broken)

  def _broken(self):
    """Source and counts by reason, of every stream."""
    return [pair for counts in self._streams.values() for pair in counts.broken.items()]

  def _check(self):
    if self.num_examples < _LEAST_EXAMPLES or self.num_broken <= self._most * self.num_examples:
      return
    by_source: dict[str, Counter] = {}
    for source, reasons in self._broken():
      by_source[source] = by_source.get(source, Counter()) + reasons
    worst = sorted(by_source.items(), key=lambda item: -item[1].total())
    named = "; ".join(
      f"{source} {counts.total()} ({', '.join(f'{n} {why}' for why, n in counts.most_common())})"
      for source, counts in worst[:_NUM_NAMED]
    )
    raise InputError(
      f"{self.num_broken} of {self.num_examples} examples could not be read, and max_broken_share "
      f"is {self._most:g}: {named}; mend them (vcflash data check names each), or allow for more"
    )
