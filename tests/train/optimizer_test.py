"""The optimiser: Muon where layers hold matrices, AdamW elsewhere."""

import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.train.optimizer import make_optimizer


def second_update(weights, gradients, peak_rate=0.1):
  """The update of step 1: at step 0 of a warm-up the rate is zero."""
  optimizer = make_optimizer(num_steps=20, peak_rate=peak_rate, weight_decay=0.0)
  state = optimizer.init(weights)
  for _ in range(2):
    updates, state = optimizer.update(gradients, state, weights)
  return updates


def test_updates_of_stacked_matrices_are_nearly_orthogonal_layer_by_layer():
  rng = np.random.default_rng(0)
  left, _, right = np.linalg.svd(rng.standard_normal((3, 8, 8)))
  gradients = left * np.linspace(0.3, 2.0, 8) @ right
  layers = {"stacked": {"kernel": jnp.asarray(gradients, jnp.float32)}}
  update = second_update(layers, layers)["stacked"]["kernel"]
  for matrix in np.asarray(update, np.float64):
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert singular.max() < 2 * singular.min()


def test_all_else_moves_by_equal_steps_against_the_sign_of_its_gradient():
  gradients = {
    "embedding": jnp.array([[3.0, -1e-3], [2.0, 5.0]]),
    "stacked": {"bias": jnp.array([[1.0, -4.0]])},
  }
  updates = second_update(gradients, gradients)
  step = abs(float(updates["embedding"][0, 0]))
  np.testing.assert_allclose(updates["embedding"], [[-step, step], [-step, -step]], rtol=1e-3)
  np.testing.assert_allclose(updates["stacked"]["bias"], [[-step, step]], rtol=1e-3)
