"""Counts examples whose row could not be read; too many of them stop the run."""

import logging
from collections import Counter
from typing import Any

from videochat_flash_jax.data.replacement import Drawn
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_LEAST_EXAMPLES = 100  # before these, one broken row says nothing about the others
_NUM_NAMED = 3  # sources in the message


class BrokenShare:
  """Counts by source and reason. A row that is drawn again, in another epoch, counts again."""

  def __init__(self, most: float):
    """Begins at nothing; `most` is the share of broken examples that is borne."""
    self._most = most
    self.num_examples = self._num_damaged = 0
    self._counts: dict[str, Counter] = {}
    self._logged: set[int] = set()

  def count(self, drawn: Drawn):
    """Counts an example under what was wrong with its row, and logs every row once.

    Raises:
      InputError: of at least a hundred examples more than the share borne were broken; names the
        worst sources.
    """
    self.num_examples += 1
    for row in drawn.passed_over:
      if row.row not in self._logged:
        self._logged.add(row.row)
        _log.warning("%s, %s is replaced: %s", row.source, row.label, row.message)
    if drawn.damaged is not None:
      self._num_damaged += 1
      if drawn.row not in self._logged:
        self._logged.add(drawn.row)
        _log.warning("%s is damaged, and used as far as it can be read", drawn.damaged)
    if drawn.passed_over:
      first = drawn.passed_over[0]
      self._counts.setdefault(first.source, Counter())[first.reason] += 1
      self._check()

  @property
  def num_broken(self) -> int:
    """Examples so far whose row could not be read."""
    return sum(count.total() for count in self._counts.values())

  def state(self) -> dict[str, Any]:
    """Fit for JSON: `examples`, `damaged`, and `broken`, counts by source and reason."""
    broken = {source: dict(counts) for source, counts in self._counts.items()}
    return {"examples": self.num_examples, "damaged": self._num_damaged, "broken": broken}

  def set_state(self, state: dict[str, Any]):
    """Goes on from what `state` gave."""
    self.num_examples, self._num_damaged = state["examples"], state["damaged"]
    self._counts = {source: Counter(counts) for source, counts in state["broken"].items()}

  def _check(self):
    if self.num_examples < _LEAST_EXAMPLES or self.num_broken <= self._most * self.num_examples:
      return
    worst = sorted(self._counts.items(), key=lambda item: -item[1].total())
    named = "; ".join(
      f"{source} {counts.total()} ({', '.join(f'{n} {why}' for why, n in counts.most_common())})"
      for source, counts in worst[:_NUM_NAMED]
    )
    raise InputError(
      f"{self.num_broken} of {self.num_examples} examples could not be read, and max_broken_share "
      f"is {self._most:g}: {named}; mend them (vcflash data check names each), or allow for more"
    )
