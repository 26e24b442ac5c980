"""A run goes on with fewer devices: 8, then 4, then 1, to the losses of one that was left alone."""

import numpy as np
import pytest

from tests.train.small_runs import RUN, finished, last_step, losses

ROWS = ("--config.rows=8", "--config.num_steps=9")
# Ends behind step N as a signal would make it, so that it does not depend on how fast steps are.
STOP_BEHIND = """
from videochat_flash_jax.train.preemption import Preemption
Preemption.is_due = lambda self: (
  setattr(self, "_asked", self._asked + 1) or self._asked == STEPS
)
"""


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices_to_the_same_losses(tmp_path):
  alone, moved = tmp_path / "alone", tmp_path / "moved"
  finished(alone, *ROWS, num_devices=8)
  for num_devices, end in ((8, 3), (4, 6)):
    said = finished(
      moved, *ROWS, num_devices=num_devices, code=STOP_BEHIND.replace("STEPS", "3") + RUN
    )
    assert "stopped and saved at step" in said and last_step(moved) == end
  finished(moved, *ROWS, num_devices=1)
  found, expected = losses(moved), losses(alone)
  assert [step for step, *_ in found] == list(range(1, 10))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
