"""Batches arrive on the mesh as they left the host, on one process or two."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from tests.data.batches.saved_batches import digest
from tests.data.batches.small_mixture import (
  assert_tells_its_own_error_alone,
  config,
  make_tokenizer,
  read_rows,
  write_mixture,
)
from tests.fake_devices import fake_devices
from tests.multidevice.two_processes_test import free_port
from tests.parallel.exchange_test import MemoryStore
from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.train import device_batches as module
from videochat_flash_jax.train.device_batches import (
  StreamExchanges,
  device_batches,
  own_rows,
  own_streams,
  row_groups,
  stream_readers,
)

ROOT = Path(__file__).parents[2]
SHAPE = NUM_ROWS, _ = 4, 256
BY_ROWS = MeshConfig(data=2, fsdp=2, sequence=2)
BY_TOKENS = MeshConfig(fsdp=1, sequence=8)


def shardings(mesh_config):
  layout = Layout(make_mesh(mesh_config))
  tokens = NamedSharding(layout.mesh, layout.spec("batch", "sequence"))
  clips = NamedSharding(layout.mesh, layout.spec("batch", "clips"))
  per_token = ("token_ids", "labels", "visual_index", "positions", "segment_ids")
  return dict.fromkeys(per_token, tokens) | dict.fromkeys(("frames", "tiles"), clips)


def data(mesh_config, workers=0):
  sizes = {"num_shards": mesh_config.sequence, "clips_per_shard": 16}
  return config(rows=NUM_ROWS, streams=2, workers=workers, **sizes)


def digests_on(mesh_config, mixture, num_batches=3):
  """Digests of batches, gathered from all devices, with this process's rows read by it alone."""
  made, placed = data(mesh_config), shardings(mesh_config)
  streams = own_streams(placed["token_ids"], SHAPE, made.streams)
  batches = mixture_batches(made, read_rows(mixture), make_tokenizer, streams)
  batches = device_batches(batches, placed, NUM_ROWS)
  gather = functools.partial(multihost_utils.process_allgather, tiled=True)
  digests = [digest(jax.tree.map(gather, next(batches))) for _ in range(num_batches)]
  batches.close()
  return streams, digests


PROCESS = f"""
import json, sys
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
join_processes(sys.argv[1], 2, int(sys.argv[2]))
from tests.multidevice.{Path(__file__).stem} import BY_ROWS, BY_TOKENS, digests_on
print(json.dumps([digests_on(mesh, Path(sys.argv[3])) for mesh in (BY_ROWS, BY_TOKENS)]))
"""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("mixture"))


def host_batches(mesh_config, mixture):
  return iter(mixture_batches(data(mesh_config), read_rows(mixture), make_tokenizer))


def test_devices_hold_the_batch_of_the_host_and_the_state_is_that_of_the_last_returned_batch(
  mixture,
):
  host, placed = host_batches(BY_ROWS, mixture), shardings(BY_ROWS)
  batches = mixture_batches(data(BY_ROWS), read_rows(mixture), make_tokenizer)
  batches = device_batches(batches, placed, NUM_ROWS)
  for _ in range(3):
    expected, found = next(host), next(batches)
    assert batches.get_state() == host.get_state()
    for name, array in expected.items():
      assert found[name].sharding.is_equivalent_to(placed[name], array.ndim)
      np.testing.assert_array_equal(found[name], array)
  state = batches.get_state()
  following = digest(jax.tree.map(np.asarray, next(batches)))
  batches.set_state(state)
  assert digest(jax.tree.map(np.asarray, next(batches))) == following
  with pytest.raises(InputError, match="format 0"):
    batches.set_state(state | {"version": 0})
  batches.close()


@pytest.fixture
def waiting(mixture, monkeypatch):
  """Batches that wait for another process, which never reads any."""
  store = MemoryStore()
  monkeypatch.setattr(module, "CoordinationStore", lambda: store)
  exchanges = StreamExchanges({0: [0, 1], 1: [0]}, "step")
  assert list(exchanges.begin()) == [0]  # the streams that are shared
  batches = mixture_batches(data(BY_ROWS), read_rows(mixture), make_tokenizer, sharing=exchanges)
  batches = device_batches(batches, shardings(BY_ROWS), NUM_ROWS, exchanges)
  batches.start_prefetch()
  return batches


def test_batches_that_wait_for_another_process_can_be_closed(waiting):
  begun = time.monotonic()
  waiting.close()
  assert time.monotonic() - begun < 20
  with pytest.raises(ValueError, match="closed"):
    next(waiting)


def test_batches_that_wait_for_another_process_can_begin_again(waiting, mixture):
  state = host_batches(BY_ROWS, mixture).get_state()
  begun = time.monotonic()
  waiting.set_state(state)
  assert waiting.get_state() == state and time.monotonic() - begun < 20
  waiting.close()


FAILING = f"""
import sys
import time
from pathlib import Path
from tests.data.batches.small_mixture import make_tokenizer, read_rows
from tests.multidevice.{Path(__file__).stem} import BY_ROWS, NUM_ROWS, data, shardings
from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.train.device_batches import device_batches
batches = mixture_batches(data(BY_ROWS, workers=1), read_rows(Path(sys.argv[1])), make_tokenizer)
batches = device_batches(batches, shardings(BY_ROWS), NUM_ROWS)
next(batches)
raise ValueError("of its own")
"""


@pytest.mark.slow
def test_a_program_that_fails_tells_its_own_error_alone(mixture):
  assert_tells_its_own_error_alone(FAILING, mixture)


@pytest.mark.slow
def test_two_processes_read_their_own_rows_and_together_hold_the_batches_of_one_process(mixture):
  expected = []
  for mesh in (BY_ROWS, BY_TOKENS):
    host = host_batches(mesh, mixture)
    expected.append([digest(next(host)) for _ in range(3)])
  address, environment = f"localhost:{free_port()}", dict(os.environ)
  environment |= {
    **fake_devices(4, num_processes=2),
    "PYTHONPATH": str(ROOT),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(number), str(mixture)],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for number in range(2)
  ]  # fmt: skip
  for number, process in enumerate(processes):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    by_rows, by_tokens = json.loads(output.splitlines()[-1])
    assert by_rows == [[number], expected[0]]
    assert by_tokens == [[0, 1], expected[1]]


def test_all_rows_of_one_process_are_one_group():
  sharding = shardings(BY_ROWS)["token_ids"]
  assert row_groups(sharding, SHAPE) == [(0, 1, 2, 3)]
  assert own_streams(sharding, SHAPE, 2) == [0, 1]


class FakeDevice:
  def __init__(self, process_index):
    self.process_index = process_index


class FakeSharding:
  """Rows that devices hold, `rows[process]` each on a device of that process; we are the first."""

  def __init__(self, *rows):
    self.rows = rows

  def devices_indices_map(self, shape):
    return {
      FakeDevice(process): (slice(*held),)
      for process, rows in enumerate(self.rows)
      for held in rows
    }

  def addressable_devices_indices_map(self, shape):
    return {FakeDevice(0): (slice(*held),) for held in self.rows[0]}


def test_processes_that_share_rows_are_one_group():
  sharding = FakeSharding([(0, 2), (2, 4)], [(0, 2), (2, 4)], [(4, 6), (6, 8)], [(4, 6), (6, 8)])
  assert row_groups(sharding, (8, 16)) == [(0, 1, 2, 3), (4, 5, 6, 7)]
  assert own_streams(sharding, (8, 16), 2) == [0] and own_streams(sharding, (8, 16), 4) == [0, 1]
  assert own_rows(sharding, (8, 16), 2) == own_rows(sharding, (8, 16), 4) == [0, 1, 2, 3]
  assert stream_readers(sharding, (8, 16), 2) == {0: [0, 1], 1: [2, 3]}
  assert stream_readers(sharding, (8, 16), 4) == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}
  assert stream_readers(sharding, (8, 16), 1) == {0: [0, 1, 2, 3]}


def test_two_processes_that_read_the_same_stream_keep_their_own_rows():
  first, second = FakeSharding([(0, 4)], [(4, 8)]), FakeSharding([(4, 8)], [(0, 4)])
  for sharding, rows in ((first, [0, 1, 2, 3]), (second, [4, 5, 6, 7])):
    assert own_streams(sharding, (8, 16), 1) == [0] and own_rows(sharding, (8, 16), 1) == rows
    assert stream_readers(sharding, (8, 16), 1) == {0: [0, 1]}


def test_processes_with_overlapping_rows_are_refused():
  with pytest.raises(InputError, match="in equal groups"):
    row_groups(FakeSharding([(0, 2), (2, 4)], [(2, 4), (4, 6)]), (6, 16))
