"""The ring gives dense attention also if the TPU's kernel computes its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops import ring_attention, splash
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.zigzag import unzigzag_order, zigzag_order

DEVICES, LENGTH, HEAD_SIZE = 4, 8 * 21, 8  # chunks are no multiple of the kernel's blocks
SEGMENT_LENGTHS = [50, 101, 17]


@pytest.fixture(autouse=True)
def kernels_as_on_a_tpu(monkeypatch):
  monkeypatch.setattr(splash, "_INTERPRET", True)
  monkeypatch.setattr(ring_attention, "target_platform", lambda: "tpu")


def random(num_heads, seed):
  shape = (1, LENGTH, num_heads, HEAD_SIZE)
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("zigzag", [False, True], ids=["in order", "zigzag"])
def test_a_ring_of_kernels_is_dense_attention(zigzag):
  mesh = make_mesh(MeshConfig(fsdp=1, sequence=DEVICES), jax.devices()[:DEVICES])
  order = zigzag_order(LENGTH, DEVICES) if zigzag else np.arange(LENGTH)
  back = unzigzag_order(LENGTH, DEVICES) if zigzag else order
  segment_ids = jnp.repeat(jnp.arange(len(SEGMENT_LENGTHS)), np.array(SEGMENT_LENGTHS))[None]
  q, weights, k, v = random(6, 0), random(6, 1), random(2, 2), random(2, 3)

  def ring(q, k, v):
    operands = (x[:, order] for x in (q, k, v, segment_ids))
    return self_attention(*operands, Layout(mesh, "ring", zigzag))[:, back]

  def dense(q, k, v):
    segments = {"query_segments": segment_ids, "key_segments": segment_ids}
    return attention(q, k, v, causal=True, implementation="dense", **segments)

  def result_and_gradients(attend):
    def loss(q, k, v):
      out = attend(q, k, v)
      return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients

  for ours, theirs in zip(result_and_gradients(ring), result_and_gradients(dense), strict=True):
    assert_close(ours, theirs, relative=1e-5)
