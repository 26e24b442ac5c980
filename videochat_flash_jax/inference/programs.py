"""The engine's jitted programs; and two of them with shapes for arguments, for `vcflash compile`.

On a mesh, rows are split over `data` and `fsdp`. Heads (and so the cache), MLP and vocabulary are
split over `tensor`. Weights are replicated over `data` and `fsdp`, so that no weight is sent
between devices while an answer is written.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.limits import check_length, check_mesh
from videochat_flash_jax.inference.sampler import sample
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.qwen2 import Caches, Qwen2
from videochat_flash_jax.models.token_dropout import DropoutPlan, plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.precision import exact_products
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.sharding import weight_shardings
from videochat_flash_jax.shapes import Array, Bool, Float, Int, UInt8

DECODE_STEPS = 16  # tokens decoded on the device before the host reads them
NO_TOKEN = -1


def _program(**options: Any) -> Callable:
  """As `jax.jit`; where weights are float32, the products of the program are exact."""

  def jitted(function):
    """The jitted program of a function of a graph, a layout, weights and other arguments."""

    @functools.wraps(function)
    def exact(graph, layout, weights, *arguments, **named):
      with exact_products(jax.tree.leaves(weights)[0].dtype):
        return function(graph, layout, weights, *arguments, **named)

    return jax.jit(exact, **options)

  return jitted


@_program(static_argnames=("graph", "layout"))
def encode(
  graph: nnx.GraphDef, layout: Layout, weights: dict, clips: UInt8[Array, "R C F S S 3"]
) -> Float[Array, "V D"]:
  """Visual tokens of clips, replicated on every device. See `VideoChatFlash.encode_rows`."""
  tokens = nnx.merge(graph, weights).encode_rows(clips, layout)
  return layout.constrain(tokens.reshape(-1, tokens.shape[-1]))


@_program(static_argnames=("graph", "layout"))
def encode_features(
  graph: nnx.GraphDef, layout: Layout, weights: dict, clips: UInt8[Array, "R C F S S 3"]
) -> Float[Array, "N V E"]:
  """The features of N = R C clips that a feature store keeps, replicated on every device."""
  features = nnx.merge(graph, weights).encode_features(clips, layout)
  features = features.reshape(-1, *features.shape[2:])
  return layout.constrain(features.astype(jnp.bfloat16))


@_program(static_argnames=("graph", "layout"))
def project(
  graph: nnx.GraphDef, layout: Layout, weights: dict, features: Float[Array, "R C V E"]
) -> Float[Array, "W D"]:
  """As `encode`, from the features of `encode_features`."""
  tokens = nnx.merge(graph, weights).project_rows(features, layout)
  return layout.constrain(tokens.reshape(-1, tokens.shape[-1]))


@_program(static_argnames=("graph", "layout", "num_slots"))
def prefill(
  graph: nnx.GraphDef,
  layout: Layout,
  weights: dict,
  token_ids: Int[Array, "B T"],
  visual_tokens: Float[Array, "B V D"],
  visual_index: Int[Array, "B T"],
  length: Int[Array, "B"],
  plan: DropoutPlan | None,
  num_slots: int,
) -> tuple[Caches, Float[Array, "B vocab"]]:
  """Reads prompts into new caches. Returns these and the logits of the next token."""
  model = nnx.merge(graph, weights)
  sequence = model.embed_sequence(token_ids, visual_tokens, visual_index, layout)
  hidden, caches = model.decoder.prefill(sequence, length, num_slots, plan, layout)
  return caches, _last_logits(model.decoder, hidden, caches[-1].length, layout)


@_program(static_argnames=("graph", "layout"), donate_argnames="caches")
def extend(
  graph: nnx.GraphDef,
  layout: Layout,
  weights: dict,
  caches: Caches,
  token_ids: Int[Array, "B T"],
  visual_tokens: Float[Array, "B V D"],
  visual_index: Int[Array, "B T"],
  length: Int[Array, "B"],
) -> tuple[Caches, Float[Array, "B vocab"]]:
  """Reads more tokens after those in the caches. Returns as `prefill`."""
  model = nnx.merge(graph, weights)
  sequence = model.embed_sequence(token_ids, visual_tokens, visual_index, layout)
  hidden, caches = model.decoder.extend(sequence, caches, length, layout)
  return caches, _last_logits(model.decoder, hidden, length, layout)


@_program(static_argnames=("graph", "layout"), donate_argnames=("caches", "logits"))
def decode(
  graph: nnx.GraphDef,
  layout: Layout,
  weights: dict,
  caches: Caches,
  logits: Float[Array, "B vocab"],
  finished: Bool[Array, "B"],
  stop_ids: Int[Array, "S"],
  key: Array,
  temperature: float,
  top_p: float,
  num_steps: int,
) -> tuple[Int[Array, "B steps"], Caches, Float[Array, "B vocab"], Bool[Array, "B"]]:
  """Decodes up to `num_steps` (at most `DECODE_STEPS`) tokens per row.

  Args:
    graph: the model, as from `nnx.split`.
    layout: how arrays are split over the mesh.
    weights: of the model, as nested dicts.
    caches: of the tokens read so far.
    logits: scores of the next token.
    finished: which rows need no more tokens.
    stop_ids: token ids that end an answer.
    key: of the random numbers.
    temperature: see `Sampling`.
    top_p: see `Sampling`.
    num_steps: the most tokens to decode.

  Returns:
    The new tokens, with `NO_TOKEN` after the stop token of a row; the caches with these tokens;
    the logits of the next token; and which rows are finished.
  """
  decoder = nnx.merge(graph, weights).decoder

  def unfinished(state):
    """Whether any row needs one more token."""
    step, *_, finished = state
    return (step < num_steps) & ~finished.all()

  def one_token(state):
    """Chooses a token per row, records it, and reads it."""
    step, tokens, caches, logits, finished = state
    token = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
    tokens = tokens.at[:, step].set(jnp.where(finished, NO_TOKEN, token))
    # A stop token is read, too, since the next turn of a chat comes after it.
    num_read = 1 - finished.astype(jnp.int32)
    embedded = decoder.embed(token[:, None], layout)
    hidden, caches = decoder.extend(embedded, caches, num_read, layout)
    finished = finished | (token[:, None] == stop_ids).any(axis=-1)
    return step + 1, tokens, caches, _logits(decoder, hidden[:, 0], layout), finished

  tokens = jnp.full((len(finished), DECODE_STEPS), NO_TOKEN, jnp.int32)
  state = (0, tokens, caches, logits, finished)
  return jax.lax.while_loop(unfinished, one_token, state)[1:]


def _last_logits(decoder, hidden, length, layout):
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  return _logits(decoder, last, layout)


def _logits(decoder: Qwen2, hidden, layout):
  return layout.constrain(decoder.logits(hidden), "batch", "vocabulary")


def bucket(size: int, smallest: int = 64) -> int:
  """Rounds a size up to 64, 96, 128, 192, 256, 384... From 64 on this adds less than a half."""
  step = smallest
  while step < size:
    step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
  return step


def padded_sizes(num_tokens: int, num_visual: int, max_new_tokens: int) -> tuple[int, int, int]:
  """The padded sizes of prompts: tokens, visual tokens, and slots of the first cache.

  padded_sizes(8448, 8192, 256) = 12288, 8192, 16384
  """
  width = bucket(num_tokens)
  return width, bucket(num_visual), bucket(width + max_new_tokens)


def plan_prompts(
  config: VideoChatFlashConfig, is_visual: Bool[np.ndarray, "B T"], length: Int[np.ndarray, "B"]
) -> DropoutPlan | None:
  """Plans the token dropout of right-padded prompts. After a drop rows are padded to a bucket."""
  if config.dropout is None:
    return None
  segment_ids = (np.arange(is_visual.shape[1]) < length[:, None]).astype(np.int32)
  return plan_dropout(config.dropout, is_visual, segment_ids, round_length=bucket)


def prefill_program(
  model_config: VideoChatFlashConfig,
  mesh: Mesh,
  *,
  rows: int,
  num_tokens: int,
  num_visual: int,
  max_new_tokens: int,
) -> tuple[Callable, tuple]:
  """The program that reads prompts, for prompts about one video each, padded as by the engine.

  Args:
    model_config: config of the model. Its weights are bfloat16.
    mesh: the devices to compile for.
    rows: number of prompts, on all devices together.
    num_tokens: tokens of a prompt, with the visual ones.
    num_visual: visual tokens of a prompt.
    max_new_tokens: tokens of an answer, for which the caches have free slots.

  Returns:
    The jitted program; and its arguments, where arrays are given by shape and sharding.

  Raises:
    InputError: rows or model cannot be split over the mesh; a prompt has more visual tokens than
      tokens; or a prompt is longer than a TPU can read at once.
  """
  layout = _layout(model_config, mesh, rows)
  if num_visual > num_tokens:
    raise InputError(
      f"a prompt of {num_tokens:,} tokens has no room for {num_visual:,} visual ones; give more "
      "tokens_per_row or fewer clips_per_shard"
    )
  width, visual_width, num_slots = padded_sizes(num_tokens, num_visual, max_new_tokens)
  check_length(layout, width, width)
  is_visual = np.broadcast_to(np.arange(width) < num_visual, (rows, width))
  shapes = (
    jax.ShapeDtypeStruct((rows, width), jnp.int32),
    jax.ShapeDtypeStruct((rows, visual_width, model_config.decoder.width), jnp.bfloat16),
    jax.ShapeDtypeStruct((rows, width), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    plan_prompts(model_config, is_visual, np.full(rows, num_tokens)),
  )
  arguments = _split(layout, shapes, "batch")
  return prefill, (*_model(model_config, layout), *arguments, num_slots)


def decode_program(
  model_config: VideoChatFlashConfig, mesh: Mesh, **prompts: int
) -> tuple[Callable, tuple]:
  """The program that writes up to `DECODE_STEPS` tokens per row. Their number is an argument.

  Args:
    model_config: config of the model. Its weights are bfloat16.
    mesh: the devices to compile for.
    **prompts: sizes of the prompts read before, as for `prefill_program`.

  Returns:
    As `prefill_program`.

  Raises:
    InputError: as for `prefill_program`.
  """
  program, arguments = prefill_program(model_config, mesh, **prompts)
  graph, layout, weights, *_ = arguments
  caches, logits = program.eval_shape(*arguments)
  caches = tuple(
    KVCache(
      *_split(layout, (cache.k, cache.v), "layer", "batch", "heads"),
      _split(layout, cache.length, "batch"),
    )
    for cache in caches
  )
  finished = jax.ShapeDtypeStruct(logits.shape[:1], jnp.bool_)
  options = jax.eval_shape(lambda: (jnp.zeros(1, jnp.int32), jax.random.key(0), 0.0, 1.0, 1))
  return decode, (
    graph,
    layout,
    weights,
    caches,
    _split(layout, logits, "batch", "vocabulary"),
    _split(layout, finished, "batch"),
    *_split(layout, options),
  )


def _layout(config, mesh, rows):
  layout = Layout(mesh, replicate_weights=True)
  check_mesh(config, layout)
  if rows % layout.row_shards:
    raise InputError(
      f"rows: {rows} is no multiple of {layout.row_shards}, which is mesh.data x mesh.fsdp; "
      "change rows or the mesh"
    )
  return layout


def _model(config, layout):
  """The first three arguments of a program, without any weights in memory."""
  model = nnx.eval_shape(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  graph, weights = nnx.split(model)
  weights = nnx.to_pure_dict(weights)
  shardings = weight_shardings(layout.mesh, weights, replicated=True)
  return graph, layout, jax.tree.map(_shape, weights, shardings)


def _split(layout: Layout, shapes: Any, *axes: str) -> Any:
  """The same shapes, with the sharding of named axes."""
  sharding = NamedSharding(layout.mesh, layout.spec(*axes))
  return jax.tree.map(lambda leaf: _shape(leaf, sharding), shapes)


def _shape(array, sharding):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
