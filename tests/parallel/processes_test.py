import os
import subprocess
import sys

import jax
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel import processes
from videochat_flash_jax.parallel.processes import exit_if_peer_fails, join_processes

TPU_VARIABLES = ("MEGASCALE_COORDINATOR_ADDRESS", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
FOUND_NONE = ValueError("coordinator_address should be defined.")


@pytest.fixture
def joined(monkeypatch):
  """The arguments of each call of `jax.distributed.initialize`, which does nothing."""
  calls = []
  for name in TPU_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
  return calls


@pytest.fixture
def on_tpu():
  """What `import jax` sets where it finds TPU chips."""
  platforms = jax.config.jax_platforms
  jax.config.update("jax_platforms", "tpu,cpu")
  yield
  jax.config.update("jax_platforms", platforms)


def fail_with(monkeypatch, error):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(jax.distributed, "initialize", fail)


@pytest.mark.parametrize(
  "variables, joins",
  [
    ({}, True),  # the metadata server may know
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_COORDINATOR_ADDRESS": "slice-0"}, True),
  ],
)
@pytest.mark.usefixtures("on_tpu")
def test_a_tpu_host_joins_unless_its_environment_says_that_it_is_alone(
  monkeypatch, joined, variables, joins
):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  join_processes()
  assert joined == [()] * joins


def test_a_process_without_tpus_computes_alone(monkeypatch, joined):
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")  # JAX_PLATFORMS=cpu on a pod
  join_processes()
  assert joined == []


@pytest.mark.usefixtures("on_tpu", "joined")
def test_a_tpu_host_of_which_nothing_is_known_computes_alone(monkeypatch):
  fail_with(monkeypatch, FOUND_NONE)
  join_processes()


def test_jax_raises_the_expected_error_where_it_finds_no_cluster():
  """The true `initialize`, in a process where no device has been asked for."""
  found_none = f"""
import jax
from videochat_flash_jax.parallel.processes import join_processes
try:
  jax.distributed.initialize()
except ValueError as error:
  assert str(error) == {str(FOUND_NONE)!r}, error
else:
  raise AssertionError("found a cluster")
join_processes()
assert not jax.distributed.is_initialized()
"""
  environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "tpu,cpu", "TPU_SKIP_MDS_QUERY": "1"}
  subprocess.run([sys.executable, "-c", found_none], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("Failed to recognize coordinator address host-0"),
    ValueError("unsupported worker-network-endpoints format: a:b"),
    ConnectionError("metadata.google.internal"),
  ],
)
@pytest.mark.usefixtures("on_tpu", "joined")
def test_a_tpu_host_that_cannot_join_says_so_in_one_line(monkeypatch, error):
  fail_with(monkeypatch, type(error)(f"{error}\nand more"))
  with pytest.raises(InputError, match="this TPU host could not join") as caught:
    join_processes()
  assert f"({error})" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_process_joins_at_the_given_coordinator(joined):
  join_processes("host-0:1234", 2, 1)
  assert joined == [("host-0:1234", 2, 1)]


def test_the_heartbeat_seconds_are_given_to_jax(monkeypatch):
  waits = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: waits.update(given))
  join_processes("host-0:1234", 2, 1, heartbeat_seconds=7)
  assert waits == {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, ConnectionError])
@pytest.mark.usefixtures("joined")
def test_a_process_that_cannot_join_names_the_coordinator(monkeypatch, kind):
  fail_with(monkeypatch, kind("Failed to start RPC server\nand more"))
  with pytest.raises(
    InputError, match=r"process 0 of 2 .* at host-0:1 \(Failed .* server\); start"
  ):
    join_processes("host-0:1", 2, 0)


@pytest.mark.parametrize(
  "given, message",
  [
    (("localhost:1", 2, None), "together, or none"),
    (("localhost", 2, 0), "coordinator is 'localhost': give host:port"),
    ((":1234", 2, 0), "coordinator is ':1234': give host:port"),
    (("localhost:1", 2, 2), "process_id is 2 of 2 processes"),
    (("localhost:1", 2, -1), "process_id is -1 of 2 processes"),
  ],
)
def test_wrong_arguments_are_refused(joined, given, message):
  with pytest.raises(InputError, match=message):
    join_processes(*given)
  assert joined == []


def test_an_input_error_is_not_taken_for_the_death_of_another_process(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "_print_if_killed", lambda line: None)
  with pytest.raises(InputError, match=r"^gloo/run:"), exit_if_peer_fails():
    raise InputError("gloo/run: no such directory")
