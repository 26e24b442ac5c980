"""The training step of a config on given devices, described by shapes: nothing is allocated.

`vcflash compile` lowers it for chips that are not here; a run fills its shapes with arrays, through
`TrainProgram.begin`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.sharding import dotted_path, weight_shardings
from videochat_flash_jax.synthetic.render import COLOURS
from videochat_flash_jax.synthetic.shapes import KINDS
from videochat_flash_jax.train.dropout_plans import ShorteningStep
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.losses import add_heads, answer_loss, patch_loss
from videochat_flash_jax.train.optimizer import make_optimizer, trained_paths
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainState, make_evaluation, make_step, split_state

_CLASSES = {"kinds": len(KINDS) + 1, "colours": len(COLOURS) + 1}  # one more for "nothing"
_STACK = "decoder.layers.stacked."


class TrainProgram(NamedTuple):
  """A step, and the shapes and shardings of what it takes.

  Attributes:
    step: `step(state, batch) -> (state, metrics)`; it consumes the state, and has `lower`.
    jitted_step: the same, for functions that are traced: it drops tokens by plans as they are.
    evaluate: `evaluate(state, batch) -> metrics`, without a gradient.
    state: shapes of weights and optimizer.
    batch: shapes of a batch, of all processes.
    weights: shapes of the model's own weights by their paths: what `begin` is to be given.
    begin: `begin(weights) -> state`; see `_begin`.
    graph: of the model, with its adapters or heads: `nnx.merge(graph, trained, frozen)`.
    layout: how all of it lies on the mesh.
  """

  step: Callable
  jitted_step: Callable
  evaluate: Callable
  state: TrainState
  batch: dict[str, Any]
  weights: dict[str, jax.ShapeDtypeStruct]
  begin: Callable[[Mapping[str, Any] | None], TrainState]
  graph: nnx.GraphDef
  layout: Layout


def train_program(settings: TrainSettings, devices: Sequence[jax.Device]) -> TrainProgram:
  """Builds the step: it computes in `compute_dtype`; what is trained has float32 weights, moments.

  What is frozen is kept in `compute_dtype`: the released weights are bfloat16.

  Raises:
    InputError: the sizes do not fit the devices, or each other.
  """
  mesh = make_mesh(settings.mesh, devices)
  zigzag = settings.zigzag and mesh.shape["sequence"] > 1
  layout = Layout(mesh, settings.sequence_parallel, zigzag)
  check_sizes(settings, layout)
  dtype = jnp.dtype(settings.compute_dtype)
  optimizer = make_optimizer(settings.optimizer, settings.num_steps)
  drawn = jax.eval_shape(lambda: _weights(_draw(settings)))
  paths = [dotted_path(path) for path, _ in _leaves(drawn)]
  is_trained = trained_paths(settings.optimizer, paths)
  draw = functools.partial(_draw, settings, frozenset(p for p in paths if not is_trained(p)))
  graph, state = jax.eval_shape(
    lambda: split_state(draw(), is_trained, optimizer, frozen_dtype=dtype)
  )
  shardings = weight_shardings(layout.mesh, state)
  loss = patch_loss
  if settings.objective == "answers":
    loss = functools.partial(answer_loss, layout=layout)
  kwargs = {"compute_dtype": dtype, "accumulate": settings.accumulate}
  step = jitted_step = make_step(graph, loss, optimizer, shardings=shardings, **kwargs)
  evaluate = make_evaluation(graph, loss, **kwargs)
  if settings.dropout is not None:
    step, evaluate = (ShorteningStep(function, layout) for function in (step, evaluate))
  state = jax.tree.map(_shape, state, shardings)
  weights = _flat(state)
  own = {path: weights[path] for path in weights if not _is_drawn(path)}
  begin = functools.partial(_begin, draw, optimizer, state)
  batch = _batch_shapes(settings, layout)
  return TrainProgram(step, jitted_step, evaluate, state, batch, own, begin, graph, layout)


def _draw(settings, frozen=frozenset()):
  """The model that is trained, its weights drawn at random, with adapters or heads.

  Args:
    settings: of the run.
    frozen: dotted paths of weights.
  """
  rngs = nnx.Rngs(settings.seed)
  model = VideoChatFlash(settings.model, rngs=rngs)
  model.vision.blocks.remat = model.decoder.layers.remat = settings.remat
  model.decoder.layers.frozen = frozenset(
    path.removeprefix(_STACK) for path in frozen if path.startswith(_STACK)
  )
  if settings.lora.rank:
    add_adapters(model, settings.lora, rngs)
  if settings.objective == "patches":
    add_heads(model, _CLASSES, rngs)
  return model


def _is_drawn(path):
  """Whether a weight is no part of a checkpoint of the model, and begins at random."""
  return path.startswith("heads.") or path.rpartition(".")[2] in ("lora_a", "lora_b")


def _begin(draw, optimizer, shapes: TrainState, weights: Mapping[str, Any] | None) -> TrainState:
  """Builds the state of a run at its first step, each part born where it is to lie.

  Args:
    draw: gives the model at random.
    optimizer: whose state to start.
    shapes: of the state.
    weights: by dotted paths, all that `TrainProgram.weights` names; adapters and heads are drawn
      unless they are given, too. None: all are drawn.

  Raises:
    InputError: a weight is missing, or has another shape.
  """
  weights, wanted = dict(weights or {}), _flat(shapes)
  missing = [path for path in wanted if path not in weights]
  for path in missing:
    if weights and not _is_drawn(path):
      raise InputError(f"the weight {path} is missing; give an init_from that has all of the model")
  drawn_shapes = {path: wanted[path] for path in missing}

  def drawn():
    flat = {dotted_path(path): leaf for path, leaf in _leaves(_weights(draw()))}
    return {path: flat[path].astype(shape.dtype) for path, shape in drawn_shapes.items()}

  shardings = {path: shape.sharding for path, shape in drawn_shapes.items()}
  arrays = jax.jit(drawn, out_shardings=shardings)()
  for path, shape in wanted.items():
    if path in weights:
      arrays[path] = _placed(path, weights.pop(path), shape)  # one after another, then let go

  def fill(shapes):
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[dotted_path(path)], shapes)

  trained, frozen = fill(shapes.trained), fill(shapes.frozen)
  optimizer_shardings = jax.tree.map(lambda shape: shape.sharding, shapes.optimizer)
  started = jax.jit(optimizer.init, out_shardings=optimizer_shardings)(trained)
  return TrainState(trained, frozen, started)


def _placed(path, array, shape):
  """A weight where it is to lie; an array that lies there already is taken as it is."""
  if array.shape != shape.shape:
    raise InputError(
      f"the weight {path} is {array.shape}, but this model's is {shape.shape}; "
      "give an init_from that fits config.model"
    )
  if isinstance(array, jax.Array) and array.sharding == shape.sharding:
    return array.astype(shape.dtype)
  return jax.make_array_from_callback(
    shape.shape, shape.sharding, lambda part: np.asarray(array[part]).astype(shape.dtype)
  )


def _weights(model):
  return nnx.to_pure_dict(nnx.state(model))


def _leaves(weights):
  return jax.tree_util.tree_leaves_with_path(weights)


def _flat(state):
  """Trained and frozen weights by their dotted paths."""
  leaves = (*_leaves(state.trained), *_leaves(state.frozen))
  return {dotted_path(path): leaf for path, leaf in leaves}


def check_sizes(settings: TrainSettings, layout: Layout):
  """Refuses what cannot be split over a mesh, before anything is compiled.

  Raises:
    InputError: names the field, and what it must be a multiple of.
  """
  sizes, decoder = layout.mesh.shape, settings.model.decoder
  chunks, for_what = layout.sequence_shards, "mesh.sequence"
  if layout.zigzag:
    chunks, for_what = 2 * chunks, "2 x mesh.sequence, since a zigzag gives each part two chunks"
  rows, of_rows = sizes["data"] * sizes["fsdp"], "mesh.data x mesh.fsdp"
  if settings.accumulate > 1:
    rows, of_rows = rows * settings.accumulate, f"{of_rows} x accumulate"
  needs = (
    ("rows", settings.rows, of_rows, rows),
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
  """Shapes of what `data.batches.sharded_rows` and `synthetic.examples` give."""
  vision, shards = settings.model.vision, layout.sequence_shards
  picture = (vision.image_size, vision.image_size, 3)

  def shape(sizes, dtype, *axes):
    return jax.ShapeDtypeStruct(
      sizes, dtype, sharding=NamedSharding(layout.mesh, layout.spec(*axes))
    )

  if settings.objective == "patches":
    clips = settings.rows * settings.clips_per_shard
    labels = (clips, vision.clip_frames * vision.grid_size**2)
    return {
      "frames": shape((clips, vision.clip_frames, *picture), jnp.uint8, "batch"),
      **{name: shape(labels, jnp.int32, "batch") for name in _CLASSES},
    }
  row = (settings.rows, settings.tokens_per_row)
  batch = {name: shape(row, jnp.int32, "batch", "sequence") for name in PER_TOKEN}
  kinds = {"frames": (settings.clips_per_shard, vision.clip_frames)}
  if settings.tiles_per_shard:
    kinds["tiles"] = (settings.tiles_per_shard, 1)
  stored = {"frames": "features", "tiles": "tile_features"}
  for kind, (number, frames) in kinds.items():
    number *= shards
    if settings.data.features:
      sizes = (settings.rows, number, settings.model.connector.clip_tokens, vision.width)
      batch[stored[kind]] = shape(sizes, jnp.bfloat16, "batch", "clips")
    else:
      sizes = (settings.rows, number, frames, *picture)
      batch[kind] = shape(sizes, jnp.uint8, "batch", "clips")
  if settings.dropout is not None:
    ids = np.zeros(row, np.int32)
    plan = plan_dropout(settings.dropout, ids > 0, ids, ids > 0, lambda _: row[1])
    batch["dropout"] = jax.tree.map(lambda x: shape(x.shape, x.dtype, "batch"), plan)
  return batch


def _shape(array, sharding):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
