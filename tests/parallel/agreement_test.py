import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.agreement import allgather_text, raise_together


@pytest.fixture
def second(monkeypatch):
  """Says what the second of two processes does, which is this one, but for what the first says."""

  def beside(first: str):
    def gather(own):
      told = np.frombuffer(first.encode(), np.uint8)
      return np.stack([np.pad(told, (0, len(own) - len(told))), own])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

  return beside


def test_texts_are_those_of_all_processes_cut_off_where_they_are_too_long(second):
  assert allgather_text("\u00e9" * 3000) == ["\u00e9" * 3000]
  second("first")
  assert allgather_text("second") == ["first", "second"]
  first, own = allgather_text("e" + "\u00e9" * 3000)
  assert first == "first" and own == "e" + "\u00e9" * 1999


def test_the_first_refusal_is_that_of_all_but_each_says_its_own(second):
  second("")
  with raise_together():
    pass
  with pytest.raises(InputError, match=r"^own$"), raise_together():
    raise InputError("own")
  second("of the first")
  with pytest.raises(InputError, match=r"^process 0: of the first$"), raise_together():
    pass
  with pytest.raises(InputError, match=r"^own$"), raise_together():
    raise InputError("own")
