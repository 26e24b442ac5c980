"""One training step as a pure function of a state and a batch, and what a run needs to call it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from videochat_flash_jax.ops.precision import exact_products
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.sharding import dotted_path, is_small
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


class TrainProgram(NamedTuple):
  """A step, and the shapes and shardings of its arguments; `train.program` builds it.

  Attributes:
    step: `step(state, batch) -> (state, metrics)`; it consumes the state, and has `lower`.
    jitted_step: the same for functions that are traced: it uses dropout plans without shortening
      them.
    evaluate: `evaluate(state, batch) -> metrics`, without a gradient.
    state: shapes of weights and optimizer.
    batch: shapes of a batch of all processes.
    weights: shapes of the model's own weights by their dotted paths: what `begin` expects.
    begin: `begin(weights) -> state`: the state before the first step; None draws all weights.
    graph: of the model, with its adapters or heads: `nnx.merge(graph, trained, frozen)`.
    layout: how arrays are sharded over the mesh.
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


def split_state(
  module: nnx.Module,
  is_trained: Callable[[str], bool],
  optimizer: optax.GradientTransformation,
  frozen_dtype: jnp.dtype | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
  """Splits a module into its graph and the state of a training run.

  Steps consume the arrays of the state, so the module cannot be used until the last state is merged
  with the graph.

  Args:
    module: a model, perhaps with adapters or heads.
    is_trained: takes the dotted path of a weight, such as `connector.fc1.kernel`.
    optimizer: its state is initialised.
    frozen_dtype: the dtype to convert frozen weights to; None: as they are.
  """

  def filter_trained(path, _):
    """Selects the weights that are trained, for `nnx.split`."""
    return is_trained(dotted_path(path))

  graph, trained, frozen = nnx.split(module, filter_trained, ...)
  trained, frozen = nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)
  return graph, TrainState(trained, _in_dtype(frozen, frozen_dtype), optimizer.init(trained))


def make_step(
  graph: nnx.GraphDef,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  compute_dtype: jnp.dtype = jnp.float32,
  trained_dtype: jnp.dtype | None = None,
  shardings: TrainState | None = None,
  accumulate: int = 1,
):
  """Returns the jitted `step(state, batch) -> (state, metrics)`; it consumes the state.

  The gradient is that of the mean over all targets of the whole batch, on all hosts and in all of
  its parts: sums are accumulated in float32, and divided once. The metrics are the loss, the shares
  of right answers by the names that the loss gives them, the number of `targets`, and the
  gradient's norm before clipping. If the loss or this norm is not finite, the state stays as it is.

  Args:
    graph: of the module, from `split_state`.
    loss: a function of the module and a batch.
    optimizer: the one that `split_state` was given.
    compute_dtype: of products in the loss; in float32, all products of the step are exact.
    trained_dtype: trained weights are converted to this dtype first of all, once a step, and their
      gradients are summed over devices in it; all but small ones (`parallel.sharding.is_small`),
      which stay as they are. None: all stay as they are.
    shardings: of the state, on a mesh.
    accumulate: the number of parts of a batch that are computed sequentially, see `_parts`.
  """

  @exact_products(compute_dtype)
  def step(state: TrainState, batch: dict[str, Array]):
    """One update of the trained weights."""
    trained = _trained_in(trained_dtype, state)

    def summed_loss(trained, batch):
      """The loss to differentiate, and all sums beside it."""
      sums = loss(nnx.merge(graph, trained, state.frozen), batch)
      return sums.loss, sums

    def gradients_of(batch):
      """The sums of a part of the batch, and their gradients in float32."""
      (_, sums), gradients = jax.value_and_grad(summed_loss, has_aux=True)(trained, batch)
      return sums, _in_dtype(gradients, jnp.float32)

    sums, gradients = _total(gradients_of, batch, accumulate)
    gradients = jax.tree.map(lambda x: x / jnp.maximum(sums.count, 1), gradients)
    if shardings is not None:
      gradients = jax.lax.with_sharding_constraint(gradients, shardings.trained)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    metrics = {**sums.means(), "grad_norm": optax.tree.norm(gradients)}
    weights = optax.apply_updates(state.trained, updates)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    weights, optimizer_state = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old),
      (weights, optimizer_state),
      (state.trained, state.optimizer),
    )
    return TrainState(weights, state.frozen, optimizer_state), metrics

  if shardings is None:
    return jax.jit(step, donate_argnums=0)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_evaluation(
  graph: nnx.GraphDef,
  loss: Loss,
  *,
  compute_dtype: jnp.dtype = jnp.float32,
  trained_dtype: jnp.dtype | None = None,
  accumulate: int = 1,
):
  """Returns the jitted `evaluate(state, batch) -> metrics`; arguments are those of `make_step`."""

  @exact_products(compute_dtype)
  def evaluate(state: TrainState, batch: dict[str, Array]):
    """The metrics of a batch, without a gradient."""
    trained = _trained_in(trained_dtype, state)
    return _total(
      lambda batch: loss(nnx.merge(graph, trained, state.frozen), batch), batch, accumulate
    ).means()

  return jax.jit(evaluate)


def _total(function, batch, accumulate):
  """Adds up a function's results over the parts of a batch, which are computed sequentially."""
  if accumulate == 1:
    return function(batch)
  parts = _parts(batch, accumulate)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
  )

  def add_part(total, part):
    """Adds the result of one part."""
    return jax.tree.map(jnp.add, total, function(part)), None

  return jax.lax.scan(add_part, zeros, parts)[0]


def _parts(batch, number):
  """Splits arrays [B, ...] to [number, B / number, ...]: row r goes to part r % number.

  Each device holds one block of rows. It holds equally many rows of each part, so no row is sent
  between devices. Four rows on two devices, in two parts:   0 1 | 2 3   ->   0 | 2   and   1 | 3
  """
  return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)


def _trained_in(dtype, state):
  """The trained weights, all but small ones in a dtype."""
  if dtype is None:
    return state.trained
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if is_small(dotted_path(path), x.ndim) else x.astype(dtype), state.trained
  )


def _in_dtype(weights, dtype):
  return weights if dtype is None else jax.tree.map(lambda x: x.astype(dtype), weights)
