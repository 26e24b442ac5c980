"""Looks up the embeddings of tokens in a table that may be sharded over a mesh."""

import jax
import jax.numpy as jnp

from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Float, Int


def embed(
  table: Float[Array, "vocab D"], token_ids: Int[Array, "B T"], layout: Layout
) -> Float[Array, "B T D"]:
  """Returns `table[token_ids]`.

  On a mesh every device looks up its columns of the table for the tokens of all devices that share
  the table, and sends each device the columns of its tokens. So embeddings are sent, and the table
  is not. Where weights are replicated, a device has all columns and looks up
  only its own tokens.

  Args:
    table: split by vocabulary ids and by columns, as `parallel.sharding` says.
    token_ids: from 0.
    layout: how table and tokens are sharded.
  """
  if layout.mesh is None:
    return table[token_ids]
  sharers = layout.axes["width"]

  def look_up(table, token_ids):
    """Embeddings of this device's tokens; `table` is this device's shard."""
    index = token_ids - layout.vocab_ids(len(table))[0]
    if sharers is not None:
      index = jax.lax.all_gather(index, sharers)  # [devices, B, T]
    is_here = (index >= 0) & (index < len(table))
    columns = jnp.where(is_here[..., None], table[jnp.where(is_here, index, 0)], 0)
    columns = layout.reduce_over(jax.lax.psum, columns, "vocabulary")
    if sharers is None:
      return columns
    columns = jax.lax.all_to_all(columns, sharers, split_axis=0, concat_axis=0)
    return jnp.moveaxis(columns, 0, 2).reshape(*token_ids.shape, -1)

  tokens = ("batch", "sequence")
  return layout.shard_map(look_up, (("vocabulary", "width"), tokens), tokens)(table, token_ids)
