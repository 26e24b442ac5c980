"""Zigzag order gives all devices of the ring equal work, counted on each device in each step."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.ops import ring_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

SHARDS, LENGTH = 8, 16 * 8


@pytest.fixture
def work(monkeypatch):
  """Counts the pairs of a query and a key that each device computes during a test.

  In a diagonal block only pairs in which the query sees the key count. Splash computes these, in
  whole tiles. Every device has one diagonal block of the same size, which changes no balance.
  """
  pairs = collections.Counter()

  def counted(attend):
    """Does what `attend` does, and adds to `pairs` each time it runs."""

    @functools.wraps(attend)
    def attend_and_count(q, k, *rest, causal, **others):
      length, num_keys = q.shape[1], k.shape[1]
      computed = length * (length + 1) // 2 if causal else length * num_keys

      def count(device):
        pairs[int(device)] += computed

      jax.debug.callback(count, jax.lax.axis_index("sequence"))
      return attend(q, k, *rest, causal=causal, **others)

    return attend_and_count

  kernels = [counted(kernel) for kernel in ring_attention._kernels()]
  monkeypatch.setattr(ring_attention, "_kernels", lambda: kernels)
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
