"""Signals that end a run: handled during it, and as before after it."""

import os
import signal

import pytest

from videochat_flash_jax.train import preemption as preemption_module
from videochat_flash_jax.train.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_after_the_step(number):
  before = signal.getsignal(number)
  with Preemption() as preemption:
    assert not preemption.is_due()
    os.kill(os.getpid(), number)
    assert preemption.is_due()
  assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_the_program_at_once():
  # A program that a script starts in the background ignores Ctrl-C; this test needs the default.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with Preemption():
      os.kill(os.getpid(), signal.SIGINT)
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_stop_that_is_due_stays_due():
  with Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGTERM)
    assert [preemption.is_due() for _ in range(3)] == [True] * 3


def test_several_processes_agree_by_a_count_that_is_not_reset_between_stages(monkeypatch):
  asked = []

  def reached(count):
    asked.append(count)
    return count == 4  # JAX says so only once

  module = preemption_module
  monkeypatch.setattr(module.jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(module.multihost_utils, "reached_preemption_sync_point", reached)
  with Preemption() as preemption:
    due = [preemption.is_due() for step in (1, 2, 3, 1, 2, 3)]
  assert due == [False] * 3 + [True] * 3 and asked == [1, 2, 3, 4]
