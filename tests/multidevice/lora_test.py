"""Adapters on a mesh compute and learn what they do on one device."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.data.batches.sharded_batch import shard_rows
from tests.models.small_models import fill_randomly
from tests.multidevice.train_step_test import MESHES, on_mesh, packed_batch, small_config
from videochat_flash_jax.models.config import LoraConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import weight_shardings
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.step import make_step, split_state

LORA = LoraConfig(rank=3, alpha=3.0, targets=r"proj$|fc\d$|qkv$")  # not larger than kernels


def stepped(layout, batch):
  """Loss and adapters after a step from random adapters."""

  def make():
    model = VideoChatFlash(small_config(), rngs=nnx.Rngs(0))
    add_adapters(model, LORA, nnx.Rngs(1))
    return model

  optimizer = optax.sgd(1.0)  # whose updates are the gradients
  graph, state = split_state(fill_randomly(make), lambda path: "lora_" in path, optimizer)
  if layout.mesh is not None:
    state = on_mesh(state, weight_shardings(layout.mesh, state))
  step = make_step(graph, functools.partial(answer_loss, layout=layout), optimizer)
  state, metrics = step(state, batch)
  return metrics["loss"], jax.tree.map(np.asarray, state.trained)


@functools.cache
def expected():
  return stepped(ONE_DEVICE, packed_batch(small_config()))


@pytest.mark.parametrize("name", ["fsdp 2 x sequence 2 x tensor 2"])
@pytest.mark.slow
def test_adapters_on_a_mesh_are_trained_as_on_one_device(name):
  mesh = make_mesh(MeshConfig(**MESHES[name]))
  shards = mesh.shape["sequence"]
  batch = shard_rows(
    packed_batch(small_config()),
    num_shards=shards,
    zigzag=shards > 1,
    clip_tokens=small_config().connector.clip_tokens,
    clips_per_shard=2,
    tiles_per_shard=2,
  )
  loss, adapters = stepped(Layout(mesh, zigzag=shards > 1), batch)
  assert_close(loss, expected()[0], relative=1e-5)
  assert len(jax.tree.leaves(adapters)) == 2 * (7 + 4 + 2)
  jax.tree.map(functools.partial(assert_close, relative=1e-5), adapters, expected()[1])


def test_adapters_are_split_as_the_kernels_beside_them():
  mesh = make_mesh(MeshConfig(sequence=2, tensor=2))
  shapes = {
    "decoder.layers.stacked.q_proj.lora_a": (3, 24, 3),
    "decoder.layers.stacked.q_proj.lora_b": (3, 3, 32),
    "decoder.layers.stacked.down_proj.lora_a": (3, 32, 3),
    "decoder.layers.stacked.down_proj.lora_b": (3, 3, 24),
    "vision.blocks.stacked.fc1.lora_b": (2, 3, 24),
  }
  tree = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
  width, tensor = ("fsdp", "sequence"), "tensor"
  specs = {path: tuple(s.spec) for path, s in weight_shardings(mesh, tree).items()}
  assert [specs[path] for path in shapes] == [
    (None, width, None),
    (None, None, tensor),
    (None, (tensor, *width), None),
    (None, None, width),
    (None, None, width),
  ]
