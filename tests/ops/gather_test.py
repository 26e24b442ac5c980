import jax
import jax.numpy as jnp
import numpy as np

from tests.models.small_models import normal
from videochat_flash_jax.ops.gather import gather_from_block, gather_tokens


def test_tokens_are_picked_row_by_row_and_filled_beyond_the_end():
  index = jnp.array([[2, 0, 3], [1, 1, 4]])
  numbers = jnp.array([[10, 11, 12], [20, 21, 22]])
  expected = [[12, 10, 7], [21, 21, 7]]
  np.testing.assert_array_equal(gather_tokens(numbers, index, fill=7), expected)
  x = normal(2, 3, 4, 5)
  picked = gather_tokens(x, index)
  np.testing.assert_array_equal(picked[0, :2], x[0, jnp.array([2, 0])])
  np.testing.assert_array_equal(picked[:, 2], 0)
  np.testing.assert_array_equal(gather_tokens(numbers > 11, index), [[1, 0, 0], [1, 1, 0]])


def test_gradients_go_back_to_the_picked_tokens_only():
  index = jnp.array([[2, 0, 2, 3]])
  gradient = jax.grad(lambda x: (gather_tokens(x, index) * jnp.arange(1.0, 5)[:, None]).sum())
  np.testing.assert_array_equal(gradient(jnp.zeros((1, 3, 2)))[0, :, 0], [2, 0, 4])


def test_blocks_of_a_row_give_their_own_tokens_and_sum_to_the_row():
  x = normal(2, 6, 3)
  index = jnp.array([[5, 0, 3, 6], [2, 6, 4, 1]])
  blocks = [gather_from_block(x[:, start : start + 2], index, start) for start in (0, 2, 4)]
  np.testing.assert_array_equal(blocks[1][0, :, 0] != 0, [False, False, True, False])
  np.testing.assert_array_equal(sum(blocks), gather_tokens(x, index))
