import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.zigzag import unzigzag_order, zigzag_order


def test_every_device_holds_an_early_and_a_late_chunk():
  assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
  assert zigzag_order(6, 3).tolist() == [0, 5, 1, 4, 2, 3]


@pytest.mark.parametrize("length, shards", [(2, 1), (24, 3), (80, 8)])
def test_the_inverse_puts_every_token_back(length, shards):
  order = zigzag_order(length, shards)
  assert order[unzigzag_order(length, shards)].tolist() == list(range(length))


@pytest.mark.parametrize("shards", [1, 2, 8, 64])
def test_the_busiest_device_attends_to_hardly_more_than_the_mean(shards):
  length = 32 * 2 * shards
  work = (1 + zigzag_order(length, shards)).reshape(shards, -1).sum(axis=1)  # keys seen
  assert work.max() <= 1.05 * work.mean()
  if shards > 1:
    in_order = (1 + np.arange(length)).reshape(shards, -1).sum(axis=1)
    assert in_order.max() > 1.4 * in_order.mean()


def test_a_length_that_does_not_divide_is_refused_with_the_next_one_that_does():
  with pytest.raises(
    InputError, match=r"20 tokens cannot be cut into 16 equal chunks .* pad it to 32"
  ):
    zigzag_order(20, 8)
