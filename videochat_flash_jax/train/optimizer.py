"""The optimisers: AdamW as published, and Muon for the tiny model; a rate for every weight."""

import math
import re
from collections.abc import Callable, Iterable

import jax
import optax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.settings import OptimizerSettings

_BATCHED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def learning_rate_at(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
  """The rate of each step, from 0: it rises along a line, then falls along half a cosine.

  Of 100 steps with `warm_up` 0.03 and `final` 0, in parts of the highest:
    step   0     1     2     3     51.5   100
    rate   0     1/3   2/3   1     1/2    0
  """
  warm_up = min(math.ceil(settings.warm_up * num_steps), num_steps - 1)
  peak = settings.learning_rate
  return optax.warmup_cosine_decay_schedule(
    0.0, peak, warm_up, num_steps, end_value=settings.final * peak
  )


def make_optimizer(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
  """Clips gradients, and moves weights by AdamW or by Muon, each at its own rate.

  Frozen weights are not for it: it keeps moments of all that it is given.

  Muon (Jordan 2024) makes the update of a matrix of a layer orthogonal; scaled as in Liu et al.
  2025 (arXiv:2502.16982), it shares its learning rate with AdamW, which moves all else. On the tiny
  encoder it needs less than half of AdamW's steps.
  """
  rate = learning_rate_at(settings, num_steps)
  if settings.name == "muon":
    update = optax.contrib.muon(
      rate,
      weight_decay=settings.weight_decay,
      adam_b2=0.98,
      adam_weight_decay=settings.weight_decay,
      muon_weight_dimension_numbers=_matrices_of_layers,
      consistent_rms=0.2,
    )
  else:
    update = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=settings.weight_decay)
  return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update, _scaled(settings))


def scale_of(settings: OptimizerSettings, path: str) -> float:
  """The factor of the rate for the weight of a dotted path; 0 if it is frozen.

  Raises:
    InputError: no expression of `settings.scales` is found in it.
  """
  return settings.scales[_place_of(settings, path)][1]


def trained_paths(settings: OptimizerSettings, paths: Iterable[str]) -> Callable[[str], bool]:
  """Checks `settings.scales` against the paths of all weights; returns which are trained.

  Raises:
    InputError: an expression is found in no weight, or not as the first; none is found in a weight;
      or nothing would be trained.
  """
  places = {path: _place_of(settings, path) for path in paths}
  for place, (pattern, _) in enumerate(settings.scales):
    if place not in places.values():
      raise InputError(
        f"config.optimizer.scales: {pattern!r} is the first to be found in no weight; "
        f"weights are such as {_some_of(places)}; take it out, or mend it"
      )
  if not any(settings.scales[place][1] for place in places.values()):
    raise InputError("config.optimizer.scales freezes all weights: give a factor above 0 to some")
  return lambda path: scale_of(settings, path) > 0


def _place_of(settings, path):
  for place, (pattern, _) in enumerate(settings.scales):
    if re.search(pattern, path):
      return place
  raise InputError(
    f"config.optimizer.scales: no expression is found in the weight {path}; "
    'give one for it, or ("", 0.0) at the end to freeze all others'
  )


def _some_of(paths):
  """A path of each part of the model."""
  parts = {path.partition(".")[0]: path for path in paths}
  return ", ".join(parts.values())


def _scaled(settings):
  """Multiplies the update of each weight by its own factor."""

  def scale(updates, weights=None):
    return jax.tree_util.tree_map_with_path(
      lambda path, update: update * scale_of(settings, dotted_path(path)), updates
    )

  return optax.stateless(scale)


def _matrices_of_layers(weights):
  """For each array how Muon reads it, or None: layers are stacked, so theirs have three axes."""

  def numbers(path, array):
    stacked = any(getattr(key, "key", None) == "stacked" for key in path)
    return _BATCHED_MATRIX if stacked and array.ndim == 3 else None

  return jax.tree_util.tree_map_with_path(numbers, weights)
