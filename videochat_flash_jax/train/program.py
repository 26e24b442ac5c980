"""Builds the training step of a config for given devices, without allocating any array.

`vcflash compile` lowers the step for chips that are not here. A run creates the arrays of the first
state with `TrainProgram.begin`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.sharding import dotted_path, weight_shardings
from videochat_flash_jax.train.dropout_plans import ShorteningStep
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.objectives import OBJECTIVES
from videochat_flash_jax.train.optimizer import make_optimizer, trained_paths
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import (
  TrainProgram,
  TrainState,
  make_evaluation,
  make_step,
  split_state,
)

_STACK = "decoder.layers.stacked."


def train_program(settings: TrainSettings, devices: Sequence[jax.Device]) -> TrainProgram:
  """Builds the step of a run, which computes in `compute_dtype`.

  Trained weights and the optimizer's moments are float32. Frozen weights are kept in
  `compute_dtype`, since the released weights are bfloat16.

  Raises:
    InputError: the sizes do not fit the devices, or each other.
  """
  objective = OBJECTIVES[settings.objective]
  mesh = make_mesh(settings.mesh, devices)
  zigzag = settings.zigzag and mesh.shape["sequence"] > 1
  dtype = jnp.dtype(settings.compute_dtype)
  layout = Layout(mesh, settings.sequence_parallel, zigzag, compute_dtype=dtype)
  _check_sizes(settings, layout)
  optimizer = make_optimizer(settings.optimizer, settings.num_steps)
  draw = functools.partial(_draw_model, settings, objective.add_heads)
  paths = [dotted_path(path) for path, _ in _leaves(jax.eval_shape(lambda: _weights(draw())))]
  is_trained = trained_paths(settings.optimizer, paths)
  draw = functools.partial(draw, frozen=frozenset(p for p in paths if not is_trained(p)))
  graph, state = jax.eval_shape(
    lambda: split_state(draw(), is_trained, optimizer, frozen_dtype=dtype)
  )
  shardings = weight_shardings(layout.mesh, state)
  loss = functools.partial(objective.loss, layout=layout)
  gradient_dtype = jnp.promote_types(dtype, settings.gradient_dtype)
  kwargs = {"compute_dtype": dtype, "trained_dtype": gradient_dtype}
  kwargs["accumulate"] = settings.accumulate
  step = jitted_step = make_step(graph, loss, optimizer, shardings=shardings, **kwargs)
  evaluate = make_evaluation(graph, loss, **kwargs)
  if settings.dropout is not None:
    step, evaluate = (ShorteningStep(function, layout) for function in (step, evaluate))
  state = jax.tree.map(_shape, state, shardings)
  weights = {path: shape for path, shape in _flat(state).items() if not _is_added(path)}
  begin = functools.partial(_begin, draw, optimizer, state)
  batch = objective.batch_shapes(settings, layout)
  return TrainProgram(step, jitted_step, evaluate, state, batch, weights, begin, graph, layout)


def _draw_model(settings, add_heads, frozen=frozenset()):
  """The model of a run with random weights, with adapters or heads.

  Args:
    settings: of the run.
    add_heads: of the objective; may be None.
    frozen: dotted paths of weights that are not trained.
  """
  rngs = nnx.Rngs(settings.seed)
  model = VideoChatFlash(settings.model, rngs=rngs)
  model.vision.blocks.remat = model.decoder.layers.remat = settings.remat
  model.decoder.layers.frozen = frozenset(
    path.removeprefix(_STACK) for path in frozen if path.startswith(_STACK)
  )
  if settings.lora.rank:
    add_adapters(model, settings.lora, rngs)
  if add_heads is not None:
    add_heads(model, rngs)
  return model


def _is_added(path):
  """Whether a weight is in no checkpoint of the model: it is part of an adapter or of a head."""
  return path.startswith("heads.") or path.rpartition(".")[2] in ("lora_a", "lora_b")


def _begin(draw, optimizer, shapes: TrainState, weights: Mapping[str, Any] | None) -> TrainState:
  """Builds the state of a run before its first step, each array directly on its devices.

  Args:
    draw: gives the model with random weights.
    optimizer: its state is initialised.
    shapes: of the state.
    weights: by dotted paths, all that `TrainProgram.weights` names. Adapters and heads begin at
      random unless they are given, too. None: all weights begin at random.

  Raises:
    InputError: a weight is missing, or has another shape.
  """
  weights, wanted = dict(weights or {}), _flat(shapes)
  missing = [path for path in wanted if path not in weights]
  for path in missing:
    if weights and not _is_added(path):
      raise InputError(f"the weight {path} is missing; give an init_from that has all of the model")
  drawn_shapes = {path: wanted[path] for path in missing}

  def drawn():
    """The weights that are missing, at random."""
    flat = {dotted_path(path): leaf for path, leaf in _leaves(_weights(draw()))}
    return {path: flat[path].astype(shape.dtype) for path, shape in drawn_shapes.items()}

  shardings = {path: shape.sharding for path, shape in drawn_shapes.items()}
  arrays = jax.jit(drawn, out_shardings=shardings)()
  for path, shape in wanted.items():
    if path in weights:
      # One weight at a time; `pop` lets the memory of the given array be freed.
      arrays[path] = _put(path, weights.pop(path), shape)

  def fill(shapes):
    """The arrays in the structure of their shapes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[dotted_path(path)], shapes)

  trained, frozen = fill(shapes.trained), fill(shapes.frozen)
  optimizer_shardings = jax.tree.map(lambda shape: shape.sharding, shapes.optimizer)
  optimizer_state = jax.jit(optimizer.init, out_shardings=optimizer_shardings)(trained)
  return TrainState(trained, frozen, optimizer_state)


def _put(path, array, shape):
  """Puts a weight on its devices; one that is there already is not copied."""
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
  """A model's weights as nested dicts."""
  return nnx.to_pure_dict(nnx.state(model))


def _leaves(weights):
  """Pairs of a path and a weight."""
  return jax.tree_util.tree_leaves_with_path(weights)


def _flat(state):
  """Trained and frozen weights by their dotted paths."""
  leaves = (*_leaves(state.trained), *_leaves(state.frozen))
  return {dotted_path(path): leaf for path, leaf in leaves}


def _check_sizes(settings: TrainSettings, layout: Layout):
  """Refuses sizes that cannot be split over a mesh, before anything is compiled.

  Raises:
    InputError: names the field, and what it must be a multiple of.
  """
  sizes, decoder = layout.mesh.shape, settings.model.decoder
  chunks, chunks_name = layout.sequence_shards, "mesh.sequence"
  if layout.zigzag:
    chunks = 2 * chunks
    chunks_name = "2 x mesh.sequence, since a zigzag gives each device two chunks"
  rows, rows_name = sizes["data"] * sizes["fsdp"], "mesh.data x mesh.fsdp"
  if settings.accumulate > 1:
    rows, rows_name = rows * settings.accumulate, f"{rows_name} x accumulate"
  rules = (
    ("rows", settings.rows, rows_name, rows),
    ("tokens_per_row", settings.tokens_per_row, chunks_name, chunks),
    ("clips_per_shard", settings.clips_per_shard, "mesh.tensor", sizes["tensor"]),
    ("tiles_per_shard", settings.tiles_per_shard, "mesh.tensor", sizes["tensor"]),
    ("model", decoder.num_heads, "mesh.tensor, to share its heads", sizes["tensor"]),
    ("model", decoder.num_kv_heads, "mesh.tensor, to share its key heads", sizes["tensor"]),
  )
  for field, size, divisor_name, divisor in rules:
    if size % divisor:
      raise InputError(
        f"config.{field}: {size} is no multiple of {divisor}, which is {divisor_name}; "
        f"change it or the mesh ({math.prod(sizes.values())} devices)"
      )


def _shape(array, sharding):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
