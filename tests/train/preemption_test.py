"""Signals that end a run: noticed, and left alone behind it."""

import os
import signal

import pytest

from videochat_flash_jax.train.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_behind_the_step(number):
  before = signal.getsignal(number)
  with Preemption() as preemption:
    assert not preemption.is_due()
    os.kill(os.getpid(), number)
    assert preemption.is_due()
  assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_the_program_at_once():
  with Preemption():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
