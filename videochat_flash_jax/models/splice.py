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
  is_visual = visual_index[..., None] >= 0
  # Text reads beyond the last visual token, so that it sends no gradient to any of them.
  index = jnp.where(is_visual, visual_index[..., None], visual_tokens.shape[1])
  visual = jnp.take_along_axis(visual_tokens, index, axis=1, mode="fill")
  return jnp.where(is_visual, visual.astype(text.dtype), text)
