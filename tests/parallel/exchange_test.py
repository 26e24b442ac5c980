"""Processes tell each other texts, through a store in memory and through that of JAX."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from jax._src import distributed
from jax._src.lib import _jax

from tests.multidevice.two_processes_test import free_port
from videochat_flash_jax.parallel.exchange import CoordinationStore, Exchange, Interrupted


class MemoryStore:
  """A store for the threads of one process."""

  def __init__(self):
    self.texts, self._changed = {}, threading.Condition()

  def set(self, key, text):
    with self._changed:
      assert key not in self.texts
      self.texts[key] = text
      self._changed.notify_all()

  def get(self, key, seconds):
    with self._changed:
      self._changed.wait_for(lambda: key in self.texts, seconds)
      return self.texts.get(key)

  def delete(self, key):
    with self._changed:
      for found in [k for k in self.texts if f"{k}/".startswith(f"{key}/")]:
        del self.texts[found]


@pytest.fixture(scope="module")
def client():
  """A process that is joined to no other one has the same store."""
  address = f"localhost:{free_port()}"
  service = _jax.get_distributed_runtime_service(address, 1)
  client = _jax.get_distributed_runtime_client(address, 0, init_timeout=60)
  client.connect()
  yield client
  client.shutdown()
  service.shutdown()


@pytest.fixture(params=["memory", "JAX"])
def store(request, monkeypatch):
  if request.param == "memory":
    return MemoryStore()
  client = request.getfixturevalue("client")
  monkeypatch.setattr(distributed.global_state, "client", client)
  return CoordinationStore()


def run_all(*functions):
  with ThreadPoolExecutor(len(functions)) as pool:
    return [task.result(timeout=60) for task in [pool.submit(f) for f in functions]]


@pytest.mark.parametrize("processes", [(0, 1), (3, 5, 9)])
def test_all_hear_what_each_has_told_in_the_same_turn(store, processes):
  name = f"heard by {processes}"
  exchanges = [Exchange(name, processes, here, store) for here in processes]

  def tell(exchange):
    return [exchange.tell(f"{exchange.here} says {turn}") for turn in range(20)]

  heard = run_all(*[lambda exchange=exchange: tell(exchange) for exchange in exchanges])
  expected = [[f"{process} says {turn}" for process in processes] for turn in range(20)]
  assert heard == [expected] * len(processes)
  left = [f"{name}/20/{who}" for who in (*processes[1:], "all")]
  assert all(store.get(key, 20) for key in left)
  assert not any(store.get(f"{name}/{turn}/all", 0.001) for turn in range(1, 20))
  exchanges[-1].forget()
  assert store.get(left[0], 20)
  exchanges[0].forget()
  assert not any(store.get(key, 0.05) for key in left)


@pytest.mark.parametrize("here", [0, 1])
def test_waiting_can_be_interrupted_and_stays_so(store, here):
  exchange = Exchange(f"interrupted at {here}", (0, 1), here, store)
  threading.Timer(0.3, exchange.interrupt).start()
  begun = time.monotonic()
  with pytest.raises(Interrupted):
    exchange.tell("into the void")
  assert 0.2 < time.monotonic() - begun < 20
  with pytest.raises(Interrupted):
    exchange.tell("again")


def test_an_error_of_the_store_is_not_taken_for_a_text_that_is_late(monkeypatch):
  class Gone:
    def blocking_key_value_get(self, *_):
      raise jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service is gone")

  monkeypatch.setattr(distributed.global_state, "client", Gone())
  with pytest.raises(jax.errors.JaxRuntimeError, match="coordination"):
    CoordinationStore().get("key", 1)
