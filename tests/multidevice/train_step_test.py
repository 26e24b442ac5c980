"""A whole training step on a mesh is that on one device: ViT, merging, decoder, loss, AdamW."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.multihost import get_barrier_sync_fn

from tests.conftest import assert_close
from tests.data.batches.sharded_batch import shard_rows
from tests.models.small_models import CONFIG, fill_randomly
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import weight_shardings
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.optimizer import make_optimizer
from videochat_flash_jax.train.settings import OptimizerSettings
from videochat_flash_jax.train.step import make_step, split_state

MESHES = {
  "one of the devices": {"fsdp": 1},
  "data 8": {"data": 8, "fsdp": 1},
  "fsdp 8": {},
  "sequence 8": {"sequence": 8},
  "tensor 2 x sequence 4": {"tensor": 2, "sequence": 4},
  "fsdp 2 x sequence 2 x tensor 2": {"sequence": 2, "tensor": 2},
}
ROWS, LENGTH, CLIPS, TILES = 8, 96, 2, 2
ADAMW = OptimizerSettings(
  "adamw",
  1e-3,
  (("vision", 0.5), ("", 1.0)),
  warm_up=0.0,  # behind a warm-up the first rate is 0, and no weight moves
  final=0.0,
  weight_decay=0.0,
  clip_norm=1.0,
)


def small_config():
  """Sizes that every mesh divides."""
  sizes = {"num_heads": 4, "num_kv_heads": 2, "vocab_size": 64, "mlp_width": 32}
  decoder = dataclasses.replace(CONFIG.decoder, **sizes)
  return dataclasses.replace(CONFIG, decoder=decoder)


def small_model():
  return fill_randomly(lambda: VideoChatFlash(small_config(), rngs=nnx.Rngs(0)))


def packed_batch(config):
  """Rows of two conversations, each about a clip and an image tile, and padding."""
  rng = np.random.default_rng(0)
  clip_tokens, size = config.connector.clip_tokens, config.vision.image_size
  token_ids = rng.integers(5, config.decoder.vocab_size, (ROWS, LENGTH)).astype(np.int32)
  visual_index = np.full((ROWS, LENGTH), -1, np.int32)
  segment_ids = np.zeros((ROWS, LENGTH), np.int32)
  positions = np.zeros((ROWS, LENGTH), np.int32)
  labels = np.full((ROWS, LENGTH), IGNORE_LABEL, np.int32)
  for row in range(ROWS):
    first = int(rng.integers(30, 50))
    for segment, (start, stop) in enumerate([(0, first), (first, LENGTH - 5)]):
      for place, item in enumerate((segment, CLIPS + segment)):
        tokens = start + 3 + place * clip_tokens + np.arange(clip_tokens)
        visual_index[row, tokens] = item * clip_tokens + np.arange(clip_tokens)
      segment_ids[row, start:stop] = segment + 1
      positions[row, start:stop] = np.arange(stop - start)
      labels[row, stop - 4 : stop] = token_ids[row, stop - 4 : stop]
  frames = rng.integers(0, 255, (ROWS, CLIPS, 4, size, size, 3)).astype(np.uint8)
  tiles = rng.integers(0, 255, (ROWS, TILES, 1, size, size, 3)).astype(np.uint8)
  return {
    "frames": frames,
    "tiles": tiles,
    "token_ids": token_ids,
    "labels": labels,
    "visual_index": visual_index,
    "positions": positions,
    "segment_ids": segment_ids,
  }


def with_dropout(batch, round_length):
  dropout = DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25))
  learnt = batch["labels"] >= 0
  plan = plan_dropout(
    dropout, batch["visual_index"] >= 0, batch["segment_ids"], learnt, round_length
  )
  return {**batch, "dropout": plan}


class Stepped(NamedTuple):
  """What a step of AdamW gives.

  The first update hardly depends on a gradient's size. The first moment does: it is a tenth of it.
  """

  loss: np.ndarray
  weights: dict
  moments: dict


def one_step(layout, batch):
  """A step from the same weights; with dropout it is that of production, which clips gradients."""
  model = small_model()
  optimizer = make_optimizer(ADAMW, 10) if "dropout" in batch else optax.adamw(1e-3)
  graph, state = split_state(model, lambda path: True, optimizer)
  if layout.mesh is not None:
    state = on_mesh(state, weight_shardings(layout.mesh, state))
    whole = NamedSharding(layout.mesh, PartitionSpec())
    batch = on_mesh(batch, jax.tree.map(lambda _: whole, batch))
  step = make_step(graph, functools.partial(answer_loss, layout=layout), optimizer)
  step = step.lower(state, batch).compile()
  # CPUs wait half a minute for each other when they meet; compiling may take them longer.
  get_barrier_sync_fn()(key="compiled", timeout_ms=300_000)
  state, metrics = step(state, batch)
  stepped = Stepped(metrics["loss"], state.trained, optax.tree.get(state.optimizer, "mu"))
  if layout.mesh is not None:  # whole on every device, so that any process can read it
    stepped = jax.jit(lambda x: x, out_shardings=whole)(stepped)
  return jax.tree.map(np.asarray, stepped)


def on_mesh(tree, shardings):
  """Arrays that every process has whole, split over the devices of all processes."""

  def put(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(put, tree, shardings)


@functools.cache
def expected(dropout):
  batch = packed_batch(small_config())
  if dropout:
    batch = with_dropout(batch, lambda length: length)
  stepped = one_step(ONE_DEVICE, batch)
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(small_model())))
  moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), stepped.weights, before)
  assert min(jax.tree.leaves(moved)) > 1e-4, moved
  return stepped


def step_on_mesh(name, dropout, sequence_parallel="ring", zigzag=True):
  """The same step, with rows laid out for a mesh."""
  devices = jax.devices()[:1] if name == "one of the devices" else jax.devices()
  mesh = make_mesh(MeshConfig(**MESHES[name]), devices)
  shards = mesh.shape["sequence"]
  layout = Layout(mesh, sequence_parallel, zigzag=zigzag and shards > 1)
  batch = packed_batch(small_config())
  plan = with_dropout(batch, lambda length: -(-length // (2 * shards)) * 2 * shards)
  batch = shard_rows(
    batch,
    num_shards=shards,
    zigzag=layout.zigzag,
    clip_tokens=small_config().connector.clip_tokens,
    clips_per_shard=2,
    tiles_per_shard=2,
  )
  if dropout:
    batch["dropout"] = plan["dropout"]
  return one_step(layout, batch)


def assert_same(actual, expected):
  assert_close(actual.loss, expected.loss, relative=1e-5)
  for ours, theirs, relative in (
    (actual.weights, expected.weights, 1e-4),
    (actual.moments, expected.moments, 1e-5),
  ):
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, our_leaf), their_leaf in leaves:
      error = np.abs(our_leaf - their_leaf).max()
      assert error <= relative * np.abs(their_leaf).max(), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True], ids=["all tokens", "dropout"])
@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_a_mesh_equals_a_step_on_one_device(name, dropout):
  assert_same(step_on_mesh(name, dropout), expected(dropout))


@pytest.mark.slow
def test_a_step_with_all_gathered_keys_and_values_equals_one_on_one_device():
  name = "tensor 2 x sequence 4"
  assert_same(step_on_mesh(name, False, sequence_parallel="all_gather"), expected(False))


@pytest.mark.slow
def test_a_step_without_zigzag_equals_one_on_one_device():
  assert_same(step_on_mesh("sequence 8", True, zigzag=False), expected(True))
