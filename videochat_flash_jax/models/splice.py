"""Puts visual tokens into the text sequence, with one gather that is planned on the host."""

import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int


def splice(
  text: Float[Array, "B T D"],
  visual_tokens: Float[Array, "B V D"],
  visual_index: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
  """Puts visual token `visual_index[t]` at position t. Where the index is -1, the text stays.

      text           [a, b, ., ., c]        (any values at the positions of visual tokens)
      visual_tokens  [x, y]
      visual_index   [-1, -1, 0, 1, -1]
      result         [a, b, x, y, c]

  Args:
    text: embedded text tokens, with room for the visual tokens.
    visual_tokens: all visual tokens of each row.
    visual_index: index of the visual token at each position, or -1.
  """
  index = visual_index[..., None]
  visual = jnp.take_along_axis(visual_tokens, jnp.maximum(index, 0), axis=1)
  return jnp.where(index >= 0, visual.astype(text.dtype), text)
