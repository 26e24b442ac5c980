import json

import jax
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel import agreement
from videochat_flash_jax.parallel.agreement import allgather_text, raise_on_all_processes


class StoreOfSecond:
  """Stands for the store that two processes share, as the second one sees it."""

  def __init__(self, first: str):
    self.first, self.own = first, None

  def set(self, key, text):
    assert key.endswith("/1")
    self.own = text

  def get(self, key, seconds):
    assert key.endswith("/all") and seconds > 0
    return json.dumps([self.first, self.own])


@pytest.fixture
def second(monkeypatch):
  """Makes this process the second of two; call it with the text that the first one sends."""

  def with_first(text: str):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(agreement, "CoordinationStore", lambda: StoreOfSecond(text))
    agreement.exchange_of_all.cache_clear()

  yield with_first
  agreement.exchange_of_all.cache_clear()


@pytest.mark.parametrize("text", ["", "second", "e" + "\u00e9" * 3000])
def test_every_process_gets_the_texts_of_all(second, text):
  assert allgather_text(text) == [text]
  for first in ("", "first"):
    second(first)
    for _ in range(3):
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
