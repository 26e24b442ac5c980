"""Looks up the embeddings of tokens in a table that may be sharded over a mesh."""

import functools

import jax
import jax.numpy as jnp
from qwix import QArray, dequantize

from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Float, Int

_TABLE, _TOKENS = ("vocabulary", "width"), ("batch", "sequence")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
  table: Float[Array, "vocab D"] | QArray, token_ids: Int[Array, "B T"], layout: Layout
) -> Float[Array, "B T D"]:
  """Returns `table[token_ids]`.

  On a mesh every device looks up its columns of the table for the tokens of all devices that share
  the table, and sends each device the columns of its tokens. So embeddings are sent, and the table
  is not. Where weights are replicated, a device has all columns and looks up
  only its own tokens.

  The gradient of a row of the table is summed in float32 over all tokens of a device that read it.
  A sum of bfloat16 ones would stay at 256, however many tokens follow.

  Args:
    table: split by vocabulary ids and by columns, as `parallel.sharding` says. For inference also
      int8: values [vocab, D], and a scale [vocab, 1] for each id, in the dtype of the result.
    token_ids: from 0. Ids below 0 read token 0, and give it no gradient.
    layout: how table and tokens are sharded; and the dtype of the result.
  """
  sharers = _sharers(layout)

  def look_up(table, token_ids):
    """Embeddings of this device's tokens; `table` is this device's shard."""
    rows = _rows_in_shard(table.shape[0], jnp.maximum(token_ids, 0), layout)
    columns = _take(table, rows).astype(layout.products_in(table))
    columns = layout.reduce_over(jax.lax.psum, columns, "vocabulary")
    if sharers is None:
      return columns
    columns = jax.lax.all_to_all(columns, sharers, split_axis=0, concat_axis=0)
    return jnp.moveaxis(columns, 0, 2).reshape(*token_ids.shape, -1)

  return layout.shard_map(look_up, (_TABLE, _TOKENS), _TOKENS)(table, token_ids)


def _take(table, rows):
  """Returns `table[rows]`, with zeros for rows that the table does not have."""
  if not isinstance(table, QArray):
    return table.at[rows].get(mode="fill", fill_value=0)
  if rows.size == 1:
    # For one row of int8 the compiler for TPUs makes a slice instead of a gather, and copies all of
    # the table before it: for every token that is decoded.
    return _take(table, jnp.stack([rows, rows]))[0]
  return dequantize(jax.tree.map(lambda part: part.at[rows].get(mode="fill", fill_value=0), table))


def _forward(table, token_ids, layout):
  return embed(table, token_ids, layout), (table, token_ids)


def _backward(layout, residuals, gradient):
  sharers = _sharers(layout)

  def add_up(table, token_ids, gradient):
    """The gradient of this device's shard of the table."""
    rows = _rows_in_shard(len(table), token_ids, layout)
    if sharers is not None:
      columns = gradient.reshape(*token_ids.shape, len(rows), -1)
      columns = jnp.moveaxis(columns, 2, 0)
      gradient = jax.lax.all_to_all(columns, sharers, split_axis=0, concat_axis=0)
    sums = jnp.zeros(table.shape, jnp.float32).at[rows].add(gradient, mode="drop")
    sums = sums.astype(table.dtype)
    if layout.mesh is None:
      return sums
    # The devices along `tensor` have other rows, and no sums of their own.
    others = {"data", "fsdp", "sequence"}.difference(sharers or ())
    return jax.lax.psum(sums, tuple(others))

  return layout.shard_map(add_up, (_TABLE, _TOKENS, _TOKENS), _TABLE)(*residuals, gradient), None


embed.defvjp(_forward, _backward)


def _sharers(layout):
  """The mesh axes over which the columns of the table are split; None if they are not."""
  return None if layout.mesh is None else layout.axes["width"]


def _rows_in_shard(num_rows, token_ids, layout):
  """The rows of this device's shard that the tokens of all its sharers read: [.., B, T].

  It is `num_rows` for tokens whose row is in another shard, and for ids below 0.
  """
  if _sharers(layout) is not None:
    token_ids = jax.lax.all_gather(token_ids, _sharers(layout))
  index = token_ids - layout.vocab_ids(num_rows)[0]
  return jnp.where((index >= 0) & (index < num_rows), index, num_rows)
