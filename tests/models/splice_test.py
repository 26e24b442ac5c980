import jax
import jax.numpy as jnp
import numpy as np

from tests.models.small_models import normal
from videochat_flash_jax.models.splice import splice

INDEX = jnp.array([[-1, -1, 0, 1, -1]])


def test_visual_tokens_take_their_places():
  text, visual = normal(1, 5, 3), normal(1, 2, 3, seed=1)
  spliced = splice(text, visual, INDEX)
  expected = jnp.stack([text[0, 0], text[0, 1], visual[0, 0], visual[0, 1], text[0, 4]])
  np.testing.assert_array_equal(spliced[0], expected)


def test_every_row_reads_its_own_visual_tokens_in_any_order():
  text, visual = normal(2, 3, 3), normal(2, 4, 3, seed=1)
  index = jnp.array([[3, -1, 0], [-1, 2, 2]])
  spliced = splice(text, visual, index)
  np.testing.assert_array_equal(spliced[0], jnp.stack([visual[0, 3], text[0, 1], visual[0, 0]]))
  np.testing.assert_array_equal(spliced[1], jnp.stack([text[1, 0], visual[1, 2], visual[1, 2]]))


def test_the_text_gives_the_dtype():
  text, visual = normal(1, 5, 3).astype(jnp.bfloat16), normal(1, 2, 3)
  assert splice(text, visual, INDEX).dtype == jnp.bfloat16


def test_gradients_reach_what_is_seen_and_nothing_else():
  text, visual = normal(1, 5, 3), normal(1, 3, 3, seed=1)
  grads = jax.grad(lambda *both: splice(*both, INDEX).sum(), argnums=(0, 1))(text, visual)
  np.testing.assert_array_equal(grads[0][0, :, 0], [1, 1, 0, 0, 1])
  np.testing.assert_array_equal(grads[1][0, :, 0], [1, 1, 0])
