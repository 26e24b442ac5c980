"""Zigzag shares out the work of the ring, counted where it is done: on every device, each hop."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.ops import partial_attention, ring_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

SHARDS, LENGTH = 8, 16 * 8


@pytest.fixture
def work(monkeypatch):
  """Pairs of a query and a key that each device has to meet, while a test runs.

  Of a diagonal block these are those below it, as splash computes them but for whole tiles; every
  device has one of the same size, so it makes no difference to the balance.
  """
  pairs = collections.Counter()

  def counted(attend):
    @functools.wraps(attend)
    def attend_and_count(q, k, *rest, diagonal):
      length, num_keys = q.shape[1], k.shape[1]
      met = length * (length + 1) // 2 if diagonal else length * num_keys

      def count(device):
        pairs[int(device)] += met

      jax.debug.callback(count, jax.lax.axis_index("sequence"))
      return attend(q, k, *rest, diagonal=diagonal)

    return attend_and_count

  block = types.SimpleNamespace(
    attend=counted(partial_attention.attend),
    attend_backward=counted(partial_attention.attend_backward),
  )
  monkeypatch.setattr(ring_attention, "_inner_block", lambda: block)
  return pairs


def run_ring(zigzag, backwards):
  layout = Layout(make_mesh(MeshConfig(fsdp=1, sequence=SHARDS)), "ring", zigzag)
  q = k = v = jnp.ones((1, LENGTH, 1, 8))
  axes = ("batch", "sequence", "heads")
  attend = layout.shard_map(
    lambda *arrays: ring_attention.ring_attention(*arrays, "sequence", zigzag),
    (axes, axes, axes, ("batch", "sequence")),
    axes,
  )
  segment_ids = jnp.ones((1, LENGTH), jnp.int32)
  run = jax.grad(lambda q: attend(q, k, v, segment_ids).sum()) if backwards else None
  jax.block_until_ready(jax.jit(run or (lambda q: attend(q, k, v, segment_ids)))(q))
  jax.effects_barrier()


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "and backwards"])
def test_the_busiest_device_computes_hardly_more_than_the_mean(work, backwards):
  run_ring(True, backwards)
  all_pairs = LENGTH * (LENGTH + 1) // 2
  assert sum(work.values()) == (1 + backwards) * all_pairs
  assert max(work.values()) <= 1.05 * sum(work.values()) / SHARDS


def test_in_the_order_of_the_text_the_last_device_computes_most(work):
  run_ring(False, False)
  assert max(work.values()) > 1.4 * sum(work.values()) / SHARDS
