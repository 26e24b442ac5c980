"""Attention sharded over a mesh is attention on one device, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.ops import attention as attention_module
from videochat_flash_jax.ops import blockwise
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.zigzag import unzigzag_order, zigzag_order

BATCH, HEAD_SIZE = 2, 8
LENGTH = 16 * 5  # no power of two
SEGMENTS = {  # of the two rows; the last segment of the first row is its padding
  "one segment": [[LENGTH], [LENGTH]],
  "packed": [[21, 40, 19], [1, 2, 77]],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "_TILE_QUERIES", 6)
  monkeypatch.setattr(blockwise, "_TILE_KEYS", 7)
  monkeypatch.setattr(attention_module, "_DENSE_SCORES", 0)  # blocks, as for any real length


def random(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(num_kv_heads):
  q, out_weights = (random(BATCH, LENGTH, 8, HEAD_SIZE, seed=seed) for seed in (0, 1))
  k, v = (random(BATCH, LENGTH, num_kv_heads, HEAD_SIZE, seed=seed) for seed in (2, 3))
  return q, k, v, out_weights


def both_passes(attend):
  """A program that gives the result of attention, and its gradients."""

  def loss(q, k, v, out_weights, segment_ids):
    out = attend(q, k, v, segment_ids)
    return jnp.sum(out * out_weights), out

  program = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

  def result_and_gradients(*arguments):
    (_, out), gradients = program(*arguments)
    return out, *gradients

  return result_and_gradients


@both_passes
def dense(q, k, v, segment_ids):
  segments = {"query_segments": segment_ids, "key_segments": segment_ids}
  return attention(q, k, v, causal=True, implementation="dense", **segments)


def sharded(layout):
  """Attention on a mesh, of operands and with a result in the order of the text."""
  order = text_order = np.arange(LENGTH)
  if layout.zigzag:
    order = zigzag_order(LENGTH, layout.sequence_shards)
    text_order = unzigzag_order(LENGTH, layout.sequence_shards)

  def attend(q, k, v, segment_ids):
    q, k, v, segments = (x[:, order] for x in (q, k, v, segment_ids))
    return self_attention(q, k, v, segments, layout)[:, text_order]

  return attend


@pytest.mark.parametrize("zigzag", [False, True], ids=["in order", "zigzag"])
@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize(
  "sizes",
  [{"sequence": 2, "data": 2}, {"sequence": 4, "tensor": 2}, {"sequence": 8}],
  ids=lambda sizes: " x ".join(f"{axis} {size}" for axis, size in sizes.items()),
)
def test_attention_on_a_mesh_is_dense_attention(sizes, kind, zigzag):
  num_devices = np.prod(list(sizes.values()))
  mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[:num_devices])
  on_mesh, arguments = both_passes(sharded(Layout(mesh, kind, zigzag))), operands(num_kv_heads=4)
  for rows in SEGMENTS.values():
    segment_ids = jnp.stack([jnp.repeat(jnp.arange(len(row)), np.array(row)) for row in rows])
    found, expected = (attend(*arguments, segment_ids) for attend in (on_mesh, dense))
    for ours, theirs in zip(found, expected, strict=True):
      assert_close(ours, theirs, relative=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
def test_a_ring_serves_grouped_queries(num_kv_heads):
  on_mesh = both_passes(sharded(Layout(make_mesh(MeshConfig(sequence=8)), zigzag=True)))
  arguments = *operands(num_kv_heads), jnp.zeros((BATCH, LENGTH), jnp.int32)
  for ours, theirs in zip(on_mesh(*arguments), dense(*arguments), strict=True):
    assert_close(ours, theirs, relative=1e-5)


def test_a_ring_computes_in_bfloat16_and_merges_in_float32():
  mesh = make_mesh(MeshConfig(sequence=8))
  segment_ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
  q, k, v, _ = (x.astype(jnp.bfloat16) for x in operands(4))
  out = jax.jit(sharded(Layout(mesh, zigzag=True)))(q, k, v, segment_ids)
  assert out.dtype == jnp.bfloat16
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)
  assert_close(out.astype(jnp.float32), exact, relative=1e-2)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize(
  "length, zigzag, complaint",
  [
    (20, False, "no 8 equal parts .* pad it to 24"),
    (24, True, "no 16 equal parts .* pad it to 32"),
  ],
)
def test_tokens_without_equal_parts_give_an_error_of_one_line(kind, length, zigzag, complaint):
  layout = Layout(make_mesh(MeshConfig(sequence=8)), kind, zigzag)
  q = k = v = random(BATCH, length, 4, HEAD_SIZE, seed=0)
  with pytest.raises(InputError, match=complaint):
    self_attention(q, k, v, None, layout)
