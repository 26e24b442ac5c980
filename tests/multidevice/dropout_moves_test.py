"""Dropping tokens of rows that are spread over a mesh: moves, and the attention that ranks."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.models.token_dropout import visual_scores
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.ops.received_attention import received_attention
from videochat_flash_jax.ops.sharded_gather import sharded_gather
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

BATCH, LENGTH, NUM_KEPT, WIDTH = 2, 16 * 5, 16 * 3, 3
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 8
ORDERS = pytest.mark.parametrize("zigzag", [False, True], ids=["in order", "zigzag"])
MESHES = pytest.mark.parametrize(
  "sizes",
  [{"sequence": 2, "data": 2}, {"sequence": 4, "tensor": 2}, {"sequence": 8}],
  ids=lambda sizes: " x ".join(f"{axis} {size}" for axis, size in sizes.items()),
)


def layout_of(sizes, zigzag):
  num_devices = np.prod(list(sizes.values()))
  return Layout(
    make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[:num_devices]), zigzag=zigzag
  )


def random(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def kept_places():
  """Places that stay: of one row many at its end, of the other few, and padding."""
  rng = np.random.default_rng(0)
  late = np.concatenate([[0, 7], np.arange(LENGTH - NUM_KEPT + 2, LENGTH)])
  few = np.pad(np.sort(rng.permutation(LENGTH)[:20]), (0, NUM_KEPT - 20), constant_values=LENGTH)
  return jnp.asarray(np.stack([late, few]))


def moved(layout, x, weights):
  """Tokens that stay, and the gradient of their weighted sum, all in the order of the layout."""
  kept, pull_back = jax.vjp(lambda x: sharded_gather(x, kept_places(), layout), x)
  return kept, *pull_back(weights)


@ORDERS
@MESHES
def test_tokens_and_gradients_arrive_as_if_picked_on_one_device(sizes, zigzag):
  x, weights = random(BATCH, LENGTH, WIDTH, seed=1), random(BATCH, NUM_KEPT, WIDTH, seed=2)
  expected, pull_back = jax.vjp(lambda x: gather_tokens(x, kept_places()), x)
  layout = layout_of(sizes, zigzag)
  arrays = (layout.to_zigzag(array) for array in (x, weights))
  spread = [layout.device_put(array, "batch", "sequence") for array in arrays]
  kept, gradient = jax.jit(functools.partial(moved, layout))(*spread)
  np.testing.assert_array_equal(layout.from_zigzag(kept), expected)
  np.testing.assert_array_equal(layout.from_zigzag(gradient), *pull_back(weights))


def test_tokens_that_stay_are_spread_evenly():
  layout = layout_of({"sequence": 8}, zigzag=True)
  x = layout.device_put(random(BATCH, LENGTH, WIDTH, seed=1), "batch", "sequence")
  kept = jax.jit(functools.partial(sharded_gather, layout=layout))(x, kept_places())
  shapes = {shard.data.shape for shard in kept.addressable_shards}
  assert shapes == {(BATCH, NUM_KEPT // 8, WIDTH)}


def test_a_move_and_its_gradient_send_blocks_from_device_to_device():
  """No row is ever gathered, and no block is kept for each hop."""
  layout, width = layout_of({"sequence": 4, "tensor": 2}, zigzag=True), 512
  tokens, weights = (
    layout.device_put(random(BATCH, length, width, seed=length), "batch", "sequence")
    for length in (LENGTH, NUM_KEPT)
  )
  compiled = jax.jit(functools.partial(moved, layout)).lower(tokens, weights).compile()
  block_bytes = BATCH * LENGTH // layout.sequence_shards * width * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * block_bytes
  collectives = set(re.findall(r" (all-[a-z]+|collective-permute)[a-z-]*\(", compiled.as_text()))
  assert collectives == {"collective-permute"}


def ranked_tokens():
  q, k = (random(BATCH, LENGTH, n, HEAD_SIZE, seed=n) for n in (NUM_HEADS, NUM_KV_HEADS))
  segment_ids = np.repeat([[1, 2, 0], [1, 2, 3]], [[30, 40, 10], [3, 60, 17]][0], axis=1)
  learnt = np.random.default_rng(3).random((BATCH, LENGTH)) < [[0.1], [0.5]]
  return q, k, jnp.asarray(segment_ids), jnp.asarray(learnt)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@ORDERS
@MESHES
def test_tokens_are_ranked_as_on_one_device(sizes, zigzag, training):
  q, k, segment_ids, learnt = ranked_tokens()
  learnt = learnt if training else None
  layout = layout_of(sizes, zigzag)
  spread = [layout.device_put(layout.to_zigzag(x), "batch", "sequence", "heads") for x in (q, k)]
  scores = jax.jit(functools.partial(visual_scores, layout=layout))(*spread, segment_ids, learnt)
  assert_close(scores, visual_scores(q, k, segment_ids, learnt), relative=1e-6)
  assert (scores > 0).sum() > LENGTH


def test_only_a_few_queries_leave_their_device():
  layout = layout_of({"sequence": 8}, zigzag=True)
  q, k, segment_ids, learnt = ranked_tokens()
  heads = ("batch", "sequence", "heads")
  asks = layout.device_put(learnt, "batch")
  rank = jax.jit(functools.partial(received_attention, layout=layout))
  keys = layout.device_put(k, *heads)
  text = rank.lower(layout.device_put(q, *heads), keys, asks, segment_ids).compile().as_text()
  shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)]
  assert keys.sharding.shard_shape(k.shape) in shapes
  assert not [shape for shape in shapes if LENGTH in shape and math.prod(shape) > BATCH * LENGTH]
