"""The order of tokens that gives every device of a ring the same amount of causal attention.

A token attends to those before it, so the device with the last stretch of a sequence would work
longest. Instead a sequence is cut into two chunks a device, and device d of n holds the chunks d
and 2n - 1 - d. For n = 2, tokens 0 to 7:

  device 0: 0 1 | 6 7        device 1: 2 3 | 4 5

The permutation is applied once, on the host, to every array that has a value per token. Attention
is told of it and never permutes.
"""

import numpy as np

from videochat_flash_jax.errors import InputError


def zigzag_order(length: int, num_shards: int) -> np.ndarray:
  """Which token stands at each place: `x[zigzag_order(...)]` is the permuted array.

  Args:
    length: tokens of a sequence, padding included.
    num_shards: devices along the ring.

  Raises:
    InputError: the chunks would not be equally long.
  """
  num_chunks = 2 * num_shards
  if length % num_chunks:
    raise InputError(
      f"a sequence of {length} tokens has no {num_chunks} equal chunks for a zigzag over "
      f"{num_shards} devices; pad it to {-(-length // num_chunks) * num_chunks}"
    )
  chunks = np.arange(length).reshape(num_chunks, -1)
  first = np.arange(num_shards)
  pairs = np.stack([first, num_chunks - 1 - first], axis=1)
  return chunks[pairs.reshape(-1)].reshape(-1)


def unzigzag_order(length: int, num_shards: int) -> np.ndarray:
  """The inverse: `x[zigzag_order(...)][unzigzag_order(...)]` is x again."""
  return np.argsort(zigzag_order(length, num_shards))
