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
      """Replaces `process_allgather`, of sizes and of padded texts."""
      first = np.frombuffer(text.encode(), np.uint8)
      if np.ndim(own) == 0:
        return np.stack([np.int32(len(first)), own])
      return np.stack([np.pad(first, (0, len(own) - len(first))), own])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

  return with_first


@pytest.mark.parametrize("text", ["", "second", "e" + "\u00e9" * 3000])
def test_every_process_gets_the_texts_of_all(second, text):
  assert allgather_text(text) == [text]
  for first in ("", "first"):
    second(first)
    assert allgather_text(text) == [first, text]


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
