import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.agreement import allgather_text, raise_on_all_processes


@pytest.fixture
def second(monkeypatch):
  """Makes this process the second of two; call it with the text that the first one sends."""

  def with_first(text: str):
    """Sets the text of the first process."""

    def gather(own):
      """Stands in for `process_allgather`."""
      first = np.frombuffer(text.encode(), np.uint8)
      return np.stack([np.pad(first, (0, len(own) - len(first))), own])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

  return with_first


def test_every_process_gets_the_texts_of_all_cut_off_where_they_are_too_long(second):
  assert allgather_text("\u00e9" * 3000) == ["\u00e9" * 3000]
  second("first")
  assert allgather_text("second") == ["first", "second"]
  first, own = allgather_text("e" + "\u00e9" * 3000)
  assert first == "first" and own == "e" + "\u00e9" * 1999


def test_an_error_of_one_process_is_raised_on_all_and_each_raises_its_own_first(second):
  second("")
  with raise_on_all_processes():
    pass
  with pytest.raises(InputError, match=r"^own$"), raise_on_all_processes():
    raise InputError("own")
  second("of the first")
  with pytest.raises(InputError, match=r"^process 0: of the first$"), raise_on_all_processes():
    pass
  with pytest.raises(InputError, match=r"^own$"), raise_on_all_processes():
    raise InputError("own")
