"""Looking up tokens in a table that may be spread over a mesh."""

import jax
import jax.numpy as jnp

from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Float, Int


def embed(
  table: Float[Array, "vocab D"], token_ids: Int[Array, "B T"], layout: Layout
) -> Float[Array, "B T D"]:
  """Returns `table[token_ids]`.

  On a mesh every device looks up its columns for the tokens of all devices that share a table, and
  gives each what belongs to it: tokens travel, the table does not. Where weights are kept gathered,
  it has all columns, and looks up its own tokens.

  Args:
    table: split by words and by columns, as `parallel.sharding` says.
    token_ids: from 0.
    layout: how all of it lies on a mesh.
  """
  if layout.mesh is None:
    return table[token_ids]
  sharers = layout.axes["width"]

  def look_up(table, token_ids):
    words = layout.vocab_ids(len(table))
    place = token_ids - words[0]
    if sharers is not None:
      place = jax.lax.all_gather(place, sharers)  # [devices, B, T]
    is_here = (place >= 0) & (place < len(table))
    columns = jnp.where(is_here[..., None], table[jnp.where(is_here, place, 0)], 0)
    columns = layout.reduce_over(jax.lax.psum, columns, "vocabulary")
    if sharers is None:
      return columns
    columns = jax.lax.all_to_all(columns, sharers, split_axis=0, concat_axis=0)
    return jnp.moveaxis(columns, 0, 2).reshape(*token_ids.shape, -1)

  tokens = ("batch", "sequence")
  return layout.shard_map(look_up, (("vocabulary", "width"), tokens), tokens)(table, token_ids)
