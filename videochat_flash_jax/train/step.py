"""One training step as a pure function: state and batch to state and metrics."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.shapes import Array
from videochat_flash_jax.train.losses import Sums

Loss = Callable[[nnx.Module, dict[str, Array]], Sums]


class TrainState(NamedTuple):
  """All that a step reads and changes; weights are nested dicts of arrays.

  Attributes:
    trained: weights that the optimiser changes.
    frozen: all other weights.
    optimizer: state of the optimiser.
  """

  trained: dict
  frozen: dict
  optimizer: optax.OptState


def split_state(
  module: nnx.Module,
  is_trained: Callable[[str], bool],
  optimizer: optax.GradientTransformation,
  frozen_dtype: jnp.dtype | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
  """Takes a module apart for training; steps consume its arrays, so put the last state back.

  Args:
    module: a model, perhaps with adapters or heads.
    is_trained: of the dotted path of a weight, such as `connector.fc1.kernel`.
    optimizer: whose state to start.
    frozen_dtype: of the weights that are not trained; None: as they are.
  """

  def filter_trained(path, _):
    return is_trained(dotted_path(path))

  graph, trained, frozen = nnx.split(module, filter_trained, ...)
  trained, frozen = nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)
  return graph, TrainState(trained, _in_dtype(frozen, frozen_dtype), optimizer.init(trained))


def make_step(
  graph: nnx.GraphDef,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  compute_dtype: jnp.dtype | None = None,
  shardings: TrainState | None = None,
  accumulate: int = 1,
):
  """Returns the jitted `step(state, batch) -> (state, metrics)`; it consumes the state.

  The gradient is that of the mean over all that counts in the whole batch, on all hosts and in all
  of its parts: sums are added up in float32, and divided once. Metrics are the loss, shares of
  right answers by the names that the loss gives them, how many `targets` were learnt, and the
  gradient's norm before it is clipped.

  Args:
    graph: of the module, from `split_state`.
    loss: of the module and a batch.
    optimizer: what `split_state` was given.
    compute_dtype: the dtype to which weights are rounded, once a step, before anything is done with
      them: on a mesh it is what travels. None: as they are.
    shardings: of the state, on a mesh.
    accumulate: parts of a batch that are computed one after another, see `_parts`.
  """

  def step(state: TrainState, batch: dict[str, Array]):
    trained, frozen = (_in_dtype(x, compute_dtype) for x in (state.trained, state.frozen))

    def objective(trained, batch):
      sums = loss(nnx.merge(graph, trained, frozen), batch)
      return sums.loss, sums

    def gradients_of(batch):
      (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(trained, batch)
      return sums, _in_dtype(gradients, jnp.float32)

    sums, gradients = _total(gradients_of, batch, accumulate)
    gradients = jax.tree.map(lambda x: x / jnp.maximum(sums.count, 1), gradients)
    if shardings is not None:
      gradients = jax.lax.with_sharding_constraint(gradients, shardings.trained)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    metrics = {**sums.means(), "grad_norm": optax.tree.norm(gradients)}
    weights = optax.apply_updates(state.trained, updates)
    return TrainState(weights, state.frozen, optimizer_state), metrics

  if shardings is None:
    return jax.jit(step, donate_argnums=0)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_evaluation(
  graph: nnx.GraphDef,
  loss: Loss,
  *,
  compute_dtype: jnp.dtype | None = None,
  accumulate: int = 1,
):
  """Returns the jitted `evaluate(state, batch) -> metrics`; arguments are those of `make_step`."""

  def evaluate(state: TrainState, batch: dict[str, Array]):
    trained, frozen = (_in_dtype(x, compute_dtype) for x in (state.trained, state.frozen))
    return _total(
      lambda batch: loss(nnx.merge(graph, trained, frozen), batch), batch, accumulate
    ).means()

  return jax.jit(evaluate)


def _total(function, batch, accumulate):
  """The sum of a function of the parts of a batch, one part after another."""
  if accumulate == 1:
    return function(batch)
  parts = _parts(batch, accumulate)
  start = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
  )

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  return jax.lax.scan(add_part, start, parts)[0]


def _parts(batch, number):
  """Arrays [B, ...] as [number, B / number, ...]: row r becomes one of part r % number.

  Every device has its rows in one block; so it has as many of each part, and none travels. Four
  rows on two devices, in two parts:   0 1 | 2 3   ->   0 | 2   and   1 | 3
  """
  return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)


def _in_dtype(weights, dtype):
  return weights if dtype is None else jax.tree.map(lambda x: x.astype(dtype), weights)
