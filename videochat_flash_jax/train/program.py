"""The training step of a config on given devices, described by shapes: nothing is allocated.

`vcflash compile` lowers it for chips that are not here; a run fills its shapes with arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.sharding import weight_shardings
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.optimizer import make_adamw
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainState, make_step, split_state

_PER_TOKEN = ("token_ids", "labels", "visual_index", "positions", "segment_ids")


class TrainProgram(NamedTuple):
  """A step, and the shapes and shardings of what it takes.

  Attributes:
    step: jitted, `step(state, batch) -> (state, metrics)`.
    state: shapes of weights and optimizer.
    batch: shapes of a batch of `data.sharded_rows`.
  """

  step: Callable
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]


def train_program(settings: TrainSettings, devices: Sequence[jax.Device]) -> TrainProgram:
  """Builds the step: bfloat16 computation, float32 weights and AdamW for what is trained.

  What is frozen is kept in bfloat16, in which it was released.

  Raises:
    InputError: the sizes do not fit the devices, or each other.
  """
  mesh = make_mesh(settings.mesh, devices)
  zigzag = settings.zigzag and mesh.shape["sequence"] > 1
  layout = Layout(mesh, settings.sequence_parallel, zigzag)
  check_sizes(settings, layout)
  optimizer = make_adamw(settings.num_steps, settings.learning_rate, settings.vision_learning_rate)

  def start():
    model = VideoChatFlash(settings.model, rngs=nnx.Rngs(0))
    return split_state(model, settings.trained, optimizer, frozen_dtype=jnp.bfloat16)

  graph, state = jax.eval_shape(start)
  shardings = weight_shardings(layout.mesh, state)
  step = make_step(
    graph,
    functools.partial(answer_loss, layout=layout),
    optimizer,
    compute_dtype=jnp.bfloat16,
    shardings=shardings,
  )
  state = jax.tree.map(_shape, state, shardings)
  return TrainProgram(step, state, _batch_shapes(settings, layout))


def check_sizes(settings: TrainSettings, layout: Layout):
  """Refuses what cannot be split over a mesh, before anything is compiled.

  Raises:
    InputError: names the field, and what it must be a multiple of.
  """
  sizes, decoder = layout.mesh.shape, settings.model.decoder
  chunks, for_what = layout.sequence_shards, "mesh.sequence"
  if layout.zigzag:
    chunks, for_what = 2 * chunks, "2 x mesh.sequence, since a zigzag gives each part two chunks"
  needs = (
    ("rows", settings.rows, "mesh.data x mesh.fsdp", sizes["data"] * sizes["fsdp"]),
    ("tokens_per_row", settings.tokens_per_row, for_what, chunks),
    ("clips_per_shard", settings.clips_per_shard, "mesh.tensor", sizes["tensor"]),
    ("tiles_per_shard", settings.tiles_per_shard, "mesh.tensor", sizes["tensor"]),
    ("model", decoder.num_heads, "mesh.tensor, to share its heads", sizes["tensor"]),
    ("model", decoder.num_kv_heads, "mesh.tensor, to share its key heads", sizes["tensor"]),
  )
  for field, size, of_what, divisor in needs:
    if size % divisor:
      raise InputError(
        f"config.{field}: {size} is no multiple of {divisor}, which is {of_what}; "
        f"change it or the mesh ({math.prod(sizes.values())} devices)"
      )


def _batch_shapes(settings, layout):
  tokens = NamedSharding(layout.mesh, layout.spec("batch", "sequence"))
  clips = NamedSharding(layout.mesh, layout.spec("batch", "clips"))
  vision, shards = settings.model.vision, layout.sequence_shards
  picture = (vision.image_size, vision.image_size, 3)
  shapes = {"frames": (shards * settings.clips_per_shard, vision.clip_frames, *picture)}
  if settings.tiles_per_shard:
    shapes["tiles"] = (shards * settings.tiles_per_shard, 1, *picture)
  row = (settings.rows, settings.tokens_per_row)
  return {
    **{
      name: jax.ShapeDtypeStruct((settings.rows, *shape), jnp.uint8, sharding=clips)
      for name, shape in shapes.items()
    },
    **{name: jax.ShapeDtypeStruct(row, jnp.int32, sharding=tokens) for name in _PER_TOKEN},
  }


def _shape(array, sharding):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
