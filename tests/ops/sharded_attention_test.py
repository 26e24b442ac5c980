"""Meshes whose `sequence` is 1; tests/multidevice tests those that split the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops import sharded_attention as module
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

BATCH, LENGTH = 2, 6
LAYOUTS = {
  "no mesh": lambda: ONE_DEVICE,
  "a mesh": lambda: Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_segments_are_passed_on_and_never_invented(monkeypatch, layout, packed):
  passed_on = []

  def recorded(*qkv, query_segments, key_segments, **others):
    passed_on.extend([query_segments is None, key_segments is None])
    segments = {"query_segments": query_segments, "key_segments": key_segments}
    return attention(*qkv, **segments, **others)

  monkeypatch.setattr(module, "attention", recorded)
  random = np.random.default_rng(0)
  q, k, v = jnp.asarray(random.standard_normal((3, BATCH, LENGTH, 2, 8)), jnp.float32)
  segments = jnp.repeat(jnp.arange(2), LENGTH // 2)[None].repeat(BATCH, 0) if packed else None
  layout = LAYOUTS[layout]()
  out = jax.jit(lambda q, k, v: self_attention(q, k, v, segments, layout))(q, k, v)
  assert passed_on == [not packed, not packed]
  expected = attention(q, k, v, causal=True, query_segments=segments, key_segments=segments)
  assert_close(out, expected, relative=1e-6)
