"""The optimisers: AdamW as published, and Muon for the tiny model; one rate for each weight."""

import math
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.settings import OptimizerSettings

_BATCHED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def learning_rate_at(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
  """The learning rate of each step, counted from 0: a linear warm-up, then a half cosine.

  With 100 steps, `warm_up` 0.03 and `final` 0, as a share of the highest rate:
    step   0     1     2     3     51.5   100
    rate   0     1/3   2/3   1     1/2    0
  """
  warm_up = min(math.ceil(settings.warm_up * num_steps), num_steps - 1)
  peak = settings.learning_rate
  return optax.warmup_cosine_decay_schedule(
    0.0, peak, warm_up, num_steps, end_value=settings.final * peak
  )


def make_optimizer(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
  """Clips gradients, then updates weights by AdamW or Muon, each with its own learning rate.

  Give it no frozen weights: it keeps moments of all weights that it gets. Norms and biases do not
  decay, see `decays`.

  Muon (Jordan 2024) makes the updates of the layers' matrices orthogonal. They are scaled as in Liu
  et al. 2025 (arXiv:2502.16982), so Muon shares its learning rate with AdamW, which updates all
  other weights. The tiny encoder needs less than half as many steps with it as with AdamW.
  """
  rate = learning_rate_at(settings, num_steps)
  if settings.name == "muon":
    update = optax.contrib.muon(
      rate,
      weight_decay=settings.weight_decay,
      adam_b2=0.98,
      adam_weight_decay=settings.weight_decay,
      muon_weight_dimension_numbers=_muon_dimensions,
      consistent_rms=0.2,
    )
  else:
    update = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=settings.weight_decay)
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm), _with_decay_of_some(update), _rescale(settings)
  )


def decays(path: str) -> bool:
  """Whether the weight with a dotted path decays: all but biases and the weights of norms.

  The original's trainer (that of transformers) leaves out the same ones.
  """
  return not re.search(r"(norm\d*\.\w+|bias)$", path)


def _with_decay_of_some(update):
  """The same transformation, for which weights that do not decay are zeros.

  Optimisers read weights for their decay only. A mask, as optax has it, would change the tree of
  the state, and with it the checkpoints.
  """

  def masked_update(gradients, state, weights):
    """The updates, and the new state."""
    decaying = jax.tree_util.tree_map_with_path(
      lambda path, x: x if decays(dotted_path(path)) else jnp.zeros_like(x), weights
    )
    return update.update(gradients, state, decaying)

  return optax.GradientTransformation(update.init, masked_update)


def scale_of(settings: OptimizerSettings, path: str) -> float:
  """The factor of the learning rate for the weight with a dotted path; 0: the weight is frozen.

  Raises:
    InputError: no expression of `settings.scales` matches the path.
  """
  return settings.scales[_first_match(settings, path)][1]


def trained_paths(settings: OptimizerSettings, paths: Iterable[str]) -> Callable[[str], bool]:
  """Checks `settings.scales` against the paths of all weights.

  Returns:
    A function that says whether the weight with a path is trained.

  Raises:
    InputError: an expression is not the first match of any weight; no expression matches a
      weight; or all weights would be frozen.
  """
  first_matches = {path: _first_match(settings, path) for path in paths}
  for index, (pattern, _) in enumerate(settings.scales):
    if index not in first_matches.values():
      raise InputError(
        f"config.optimizer.scales: {pattern!r:.80} is not the first match of any weight; "
        f"there are weights such as {_examples(first_matches)}; remove it, or correct it"
      )
  if not any(settings.scales[index][1] for index in first_matches.values()):
    raise InputError("config.optimizer.scales freezes all weights: give a factor above 0 to some")
  return lambda path: scale_of(settings, path) > 0


def _first_match(settings, path):
  """The index in `settings.scales` of the first expression that matches a path."""
  for index, (pattern, _) in enumerate(settings.scales):
    if re.search(pattern, path):
      return index
  raise InputError(
    f"config.optimizer.scales: no expression matches the weight {path}; "
    'give one for it, or ("", 0.0) at the end to freeze all others'
  )


def _examples(paths):
  """One path of each part of the model."""
  parts = {path.partition(".")[0]: path for path in paths}
  return ", ".join(parts.values())


def _rescale(settings):
  """A transformation that multiplies the update of each weight by its factor."""

  def scale(updates, weights=None):
    """The scaled updates."""
    return jax.tree_util.tree_map_with_path(
      lambda path, update: update * scale_of(settings, dotted_path(path)), updates
    )

  return optax.stateless(scale)


def _muon_dimensions(weights):
  """The matrix axes of each array that Muon updates; None for those that AdamW updates.

  Layers are stacked, so their matrices are arrays of three axes.
  """

  def dimensions(path, array):
    """The matrix axes of one array, or None."""
    stacked = any(getattr(key, "key", None) == "stacked" for key in path)
    return _BATCHED_MATRIX if stacked and array.ndim == 3 else None

  return jax.tree_util.tree_map_with_path(dimensions, weights)
