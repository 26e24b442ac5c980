"""The zigzag order of tokens: every device of a ring computes equally much causal attention.

A token attends to the tokens before it. If a sequence were cut into one piece per device, the
device with the last piece would compute most. So a sequence is cut into two chunks per device, and
device d of n holds the chunks d and 2n - 1 - d. For n = 2 and tokens 0 to 7:

  device 0: 0 1 | 6 7        device 1: 2 3 | 4 5

The host permutes every array that has a value per token, once. Attention knows the order
(`Layout.zigzag`) and never permutes.
"""

import numpy as np

from videochat_flash_jax.errors import InputError


def zigzag_order(length: int, num_shards: int) -> np.ndarray:
  """The zigzag order, int [length]: `x[zigzag_order(...)]` is x in zigzag order.

  `zigzag_order(8, 2)` is 0 1 6 7 2 3 4 5.

  Args:
    length: tokens of a sequence, padding included.
    num_shards: devices in the ring.

  Raises:
    InputError: the length cannot be cut into 2 * num_shards equal chunks.
  """
  num_chunks = 2 * num_shards
  if length % num_chunks:
    raise InputError(
      f"a sequence of {length} tokens cannot be cut into {num_chunks} equal chunks for the zigzag "
      f"order over {num_shards} devices; pad it to {-(-length // num_chunks) * num_chunks}"
    )
  chunks = np.arange(length).reshape(num_chunks, -1)
  first = np.arange(num_shards)
  pairs = np.stack([first, num_chunks - 1 - first], axis=1)
  return chunks[pairs.reshape(-1)].reshape(-1)


def unzigzag_order(length: int, num_shards: int) -> np.ndarray:
  """The inverse order, int [length]: `x[zigzag_order(...)][unzigzag_order(...)]` is x again."""
  return np.argsort(zigzag_order(length, num_shards))
