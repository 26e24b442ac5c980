"""What the engine is given and what it has read: `Prompt` and `Reading`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.inference.token_rows import TokenRows
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.shapes import Array, Float, Int


class Prompt(NamedTuple):
  """One row of a batch: a sequence from `data.text.visual_slots.open_slots`, and its visual tokens.

  Attributes:
    token_ids: text, with room for the visual tokens.
    visual_index: index of the visual token at each position; -1 for text.
    visual_tokens: visual tokens of all clips and image tiles.
  """

  token_ids: Int[np.ndarray, "T"]
  visual_index: Int[np.ndarray, "T"]
  visual_tokens: Float[np.ndarray, "V D"]


class Reading(NamedTuple):
  """The state of a batch after reading: its own tokens, behind those of one or more prefixes.

  Attributes:
    caches: of the rows' own tokens, one for each part of the layers.
    behind: for each part, the caches that the rows stand behind, see `KVCache.attend`. Those of the
      parts that depend on the question hold the visual tokens that attention chose.
    logits: scores of the next token.
    num_shared: number of parts that do not depend on the question.
    entered: for each row, what of its own tokens has entered the first drop that ranks.
  """

  caches: tuple[KVCache, ...]
  behind: tuple[tuple[KVCache, ...], ...]
  logits: Float[Array, "B vocab"]
  num_shared: int
  entered: tuple[TokenRows, ...] = ()

  @property
  def lengths(self) -> Int[np.ndarray, "B"]:
    """Number of own tokens of each row."""
    return np.asarray(self.caches[0].length)[:, 0]

  @property
  def is_lost(self) -> bool:
    """Whether its caches were donated, and an error or Ctrl-C came before the new ones."""
    return any(array.is_deleted() for array in jax.tree.leaves(self.caches))

  def num_kept(self, num_tokens: int) -> int:
    """How many of the first own tokens of a row, which has so many, can be kept by `rewound`."""
    return min([num_tokens, *map(len, self.entered)])

  def rewound(self, num_tokens: int) -> "Reading":
    """Keeps the first own tokens of each row only, for `Engine.read` to continue.

    Nothing is kept of the parts above a drop that ranks: the next question chooses anew.
    """
    for states in self.entered:
      states.truncate(num_tokens)
    shared = self.num_shared
    caches = tuple(
      cache._replace(length=jnp.full_like(cache.length, num_tokens))
      for cache in self.caches[:shared]
    )
    return self._replace(caches=caches, behind=self.behind[:shared])
