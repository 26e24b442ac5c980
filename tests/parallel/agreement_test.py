import jax
import pytest
from jax._src import distributed

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.agreement import allgather_text, raise_on_all_processes


class Service:
  """Stands for the service that coordinates two processes: it holds what the first one sent."""

  def __init__(self, first: str):
    self.first, self.own = first.encode(), {}

  def key_value_set_bytes(self, key, value):
    assert key not in self.own
    self.own[key] = value

  def blocking_key_value_get_bytes(self, key, milliseconds):
    assert milliseconds > 0
    return self.first if key.endswith("/0") else self.own[key]

  def key_value_delete(self, key):
    self.own.pop(key, None)


@pytest.fixture
def second(monkeypatch):
  """Makes this process the second of two; call it with the text that the first one sends."""

  def with_first(text: str) -> Service:
    """Sets the text of the first process."""
    service = Service(text)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed.global_state, "client", service)
    return service

  return with_first


@pytest.mark.parametrize("text", ["", "second", "e" + "\u00e9" * 3000])
def test_every_process_gets_the_texts_of_all(second, text):
  assert allgather_text(text) == [text]
  for first in ("", "first"):
    service = second(first)
    for _ in range(3):
      assert allgather_text(text) == [first, text]
    assert len(service.own) == 1, "texts that all have read are deleted"


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
