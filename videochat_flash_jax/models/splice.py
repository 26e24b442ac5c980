"""Visual tokens take their places in the text sequence: one gather, planned on the host."""

import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int


def splice(
  text: Float[Array, "B T D"],
  visual_tokens: Float[Array, "B V D"],
  visual_index: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
  """Puts visual token `visual_index[t]` at position t; where the index is -1, text stays.

      text           [a, b, ., ., c]        (what stands under a visual token does not matter)
      visual_tokens  [x, y]
      visual_index   [-1, -1, 0, 1, -1]
      result         [a, b, x, y, c]

  Args:
    text: embedded text tokens, already laid out with room for the visual tokens.
    visual_tokens: all visual tokens of the row, one clip or tile after another.
    visual_index: which visual token stands at each position, or -1.
  """
  places = jnp.maximum(visual_index, 0)[..., None]
  placed = jnp.take_along_axis(visual_tokens, places, axis=1)
  return jnp.where(visual_index[..., None] >= 0, placed.astype(text.dtype), text)
