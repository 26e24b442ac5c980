"""One training step as a pure function: state and batch to state and metrics."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from videochat_flash_jax.shapes import Array

Loss = Callable[[nnx.Module, dict[str, Array]], tuple[Array, dict[str, Array]]]


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
  parts: Sequence[str],
  optimizer: optax.GradientTransformation,
  frozen_dtype: jnp.dtype | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
  """Takes a module apart for training; steps consume its arrays, so put the last state back.

  Args:
    module: a model, or a model with heads.
    parts: names of the submodules to train, as they occur in the paths of weights ("vision").
    optimizer: whose state to start.
    frozen_dtype: of the weights that are not trained; None: as they are.
  """

  def is_trained(path, _):
    return any(part in path for part in parts)

  graph, trained, frozen = nnx.split(module, is_trained, ...)
  trained, frozen = nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)
  return graph, TrainState(trained, _in_dtype(frozen, frozen_dtype), optimizer.init(trained))


def make_step(
  graph: nnx.GraphDef,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  compute_dtype: jnp.dtype | None = None,
  shardings: TrainState | None = None,
):
  """Returns the jitted `step(state, batch) -> (state, metrics)`; it consumes the state.

  Args:
    graph: of the module, from `split_state`.
    loss: of the module and a batch.
    optimizer: what `split_state` was given.
    compute_dtype: the dtype to which weights are rounded, once a step, before anything is done with
      them: on a mesh it is what travels. None: as they are.
    shardings: of the state, on a mesh.
  """

  def step(state: TrainState, batch: dict[str, Array]):
    def objective(trained):
      trained, frozen = (_in_dtype(x, compute_dtype) for x in (trained, state.frozen))
      return loss(nnx.merge(graph, trained, frozen), batch)

    (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trained)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return TrainState(trained, state.frozen, optimizer_state), {"loss": value, **metrics}

  if shardings is None:
    return jax.jit(step, donate_argnums=0)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _in_dtype(weights, dtype):
  return weights if dtype is None else jax.tree.map(lambda x: x.astype(dtype), weights)
