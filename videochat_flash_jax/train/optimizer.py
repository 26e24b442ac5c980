"""The optimisers: AdamW for the released sizes, Muon for the tiny one."""

import jax
import optax

from videochat_flash_jax.parallel.sharding import dotted_path

_BATCHED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def make_adamw(
  num_steps: int, learning_rate: float, vision_learning_rate: float
) -> optax.GradientTransformation:
  """AdamW as in the published recipe, with a rate of its own for the video encoder.

  Gradients are clipped to a norm of 1. Rates rise over 3 % of the steps, then fall as a cosine to
  zero. There is no weight decay.

  Args:
    num_steps: of the run.
    learning_rate: the highest.
    vision_learning_rate: the highest for weights whose path begins with `vision`.
  """

  def scaled(peak):
    warm_up = 3 * num_steps // 100
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, num_steps)
    return optax.scale_by_learning_rate(schedule)

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    optax.partition(
      {"vision": scaled(vision_learning_rate), "rest": scaled(learning_rate)}, _vision_or_rest
    ),
  )


def _vision_or_rest(weights):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "vision" if dotted_path(path).startswith("vision.") else "rest", weights
  )


def make_optimizer(
  num_steps: int, peak_rate: float, weight_decay: float = 0.02
) -> optax.GradientTransformation:
  """Clipped gradients; the rate rises over 5 % of the steps, then falls as a cosine to 2 %.

  Muon (Jordan 2024) makes the update of a matrix orthogonal; scaled as in Liu et al. 2025
  (arXiv:2502.16982), it shares its learning rate with AdamW. On the tiny encoder it needs less
  than half of AdamW's steps.
  """
  rate = optax.warmup_cosine_decay_schedule(
    0.0, peak_rate, num_steps // 20, num_steps, end_value=0.02 * peak_rate
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      rate,
      weight_decay=weight_decay,
      adam_b2=0.98,
      adam_weight_decay=weight_decay,
      muon_weight_dimension_numbers=_matrices_of_layers,
      consistent_rms=0.2,
    ),
  )


def _matrices_of_layers(weights):
  """For each array how Muon reads it, or None: layers are stacked, so theirs have three axes."""

  def numbers(path, array):
    stacked = any(getattr(key, "key", None) == "stacked" for key in path)
    return _BATCHED_MATRIX if stacked and array.ndim == 3 else None

  return jax.tree_util.tree_map_with_path(numbers, weights)
