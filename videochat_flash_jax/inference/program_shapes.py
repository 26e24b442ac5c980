"""The engine's programs with shapes for arguments, for `vcflash compile`: nothing is in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from videochat_flash_jax.checkpoints.hub.int8_tensors import int8_shapes
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import CLIPS_PER_GROUP
from videochat_flash_jax.inference.limits import check_mesh
from videochat_flash_jax.inference.prefix import CHUNK, num_own_slots, whole_chunks
from videochat_flash_jax.inference.programs import ModelGraph, Tokens, decode, encode, read
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.kv_formats import FORMATS, KVFormat, Wide
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.sharding import weight_shardings

_QUESTION_TOKENS = 64


def encode_program(model_config: VideoChatFlashConfig, mesh: Mesh) -> tuple[Callable, tuple]:
  """The program that encodes a group of clips; arguments and result as for `prefill_program`."""
  layout, model = _model(model_config, mesh, None)
  vision = model_config.vision
  frame = (vision.clip_frames, vision.image_size, vision.image_size, 3)
  clips = jax.ShapeDtypeStruct((1, CLIPS_PER_GROUP * mesh.size, *frame), jnp.uint8)
  return encode, (*model, _shapes(layout, clips, "batch", "clips"))


def prefill_program(
  model_config: VideoChatFlashConfig,
  mesh: Mesh,
  *,
  num_tokens: int,
  num_visual: int,
  weights: str | None = None,
  cache: str | None = None,
) -> tuple[Callable, tuple]:
  """The program that reads a chunk of a video with the first part of the layers.

  Its arguments include all weights and the caches of all parts: these are there while it runs.

  Args:
    model_config: config of the model.
    mesh: the devices to compile for.
    num_tokens: tokens before the question, with the visual ones.
    num_visual: visual tokens among them.
    weights: "int8", or None for bfloat16.
    cache: "int8" or "int4", or None for bfloat16.

  Returns:
    The jitted program; and its arguments, where arrays are given by shape and sharding.

  Raises:
    InputError: the model cannot be split over the mesh, or there are more visual tokens
      than tokens.
  """
  layout, model = _model(model_config, mesh, weights)
  first, *others = _prefix_caches(model_config, layout, num_tokens, num_visual, cache)
  width = model_config.decoder.width
  tokens = Tokens(
    jax.ShapeDtypeStruct((1, CHUNK), jnp.int32),
    jax.ShapeDtypeStruct((1, CHUNK, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, CHUNK), jnp.int32),
  )
  entering = _shapes(layout, (tokens, jax.ShapeDtypeStruct((1,), jnp.int32)))
  layers = range(first.depth)
  wanted = "states" if others else ""

  def read_beside(weights, tokens, count, cache, others):
    """As `read`, while the other caches stay on the device."""
    return read(*model[:2], weights, tokens, count, cache, (), layers, wanted), others

  # The encoder and the head are not used here, but they are there.
  beside = jax.jit(read_beside, donate_argnums=(3, 4), keep_unused=True)
  return beside, (model[2], *entering, first, tuple(others))


def decode_program(
  model_config: VideoChatFlashConfig,
  mesh: Mesh,
  *,
  rows: int,
  num_tokens: int,
  num_visual: int,
  max_new_tokens: int,
  weights: str | None = None,
  cache: str | None = None,
) -> tuple[Callable, tuple]:
  """The program that writes up to `DECODE_STEPS` tokens of the answers to questions.

  Args:
    model_config: as for `prefill_program`.
    mesh: as for `prefill_program`.
    rows: number of questions about one video.
    num_tokens: as for `prefill_program`.
    num_visual: as for `prefill_program`.
    max_new_tokens: tokens of an answer.
    weights: as for `prefill_program`.
    cache: as for `prefill_program`.

  Returns:
    As `prefill_program`.

  Raises:
    InputError: as for `prefill_program`.
  """
  layout, model = _model(model_config, mesh, weights)
  caches = _prefix_caches(model_config, layout, num_tokens, num_visual, cache)
  behind = tuple(
    (cache,) * (1 if number < model_config.num_shared_parts else rows)
    for number, cache in enumerate(caches)
  )
  num_slots = num_own_slots(0, _QUESTION_TOKENS, max_new_tokens)
  own = tuple(_cache(model_config, layout, cache.depth, rows, num_slots) for cache in caches)
  logits = jax.ShapeDtypeStruct((rows, model_config.decoder.vocab_size), jnp.float32)
  finished = jax.ShapeDtypeStruct((rows,), jnp.bool_)
  options = jax.eval_shape(lambda: (jnp.zeros(1, jnp.int32), jax.random.key(0), 0.0, 1.0, 1))
  return decode, (
    *model,
    own,
    behind,
    _shapes(layout, logits, "batch", "vocabulary"),
    *_shapes(layout, (finished, *options)),
  )


def _prefix_caches(config, layout, num_tokens, num_visual, kept_as):
  """The cache of each part of the layers, of what stands before the question."""
  if num_visual > num_tokens:
    raise InputError(
      f"a prompt of {num_tokens:,} tokens has no room for {num_visual:,} visual ones; give more "
      "tokens_per_row or fewer clips_per_shard"
    )
  drops = {}
  if config.dropout is not None:
    is_visual = np.arange(num_tokens)[None] < num_visual
    drops = plan_dropout(config.dropout, is_visual, np.ones_like(is_visual, np.int32)).drops
  lengths = [num_tokens, *(drop.indices.shape[1] for drop in drops.values())]
  shards = layout.slot_shards
  return [
    _cache(config, layout, len(layers), 1, whole_chunks(length), FORMATS[kept_as], shards)
    for layers, length in zip(config.layer_parts, lengths, strict=True)
  ]


def _cache(config, layout, depth, batch, num_slots, kept_as: type[KVFormat] = Wide, shards=1):
  """The shape of a cache, and how it is split."""

  def make():
    """The cache itself."""
    options = {"depth": depth, "dtype": jnp.bfloat16, "kept_as": kept_as, "shards": shards}
    return KVCache.empty(config.decoder, batch, num_slots, **options)

  cache = jax.eval_shape(make)
  return jax.tree.map(_shape, cache, layout.shardings(cache.axes))


def _model(config, mesh, weights):
  """The layout; and the first three arguments of a program, without any weights in memory."""
  layout = Layout(mesh, replicate_weights=True)
  check_mesh(config, layout)
  model = nnx.eval_shape(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  graph, shapes = nnx.split(model)
  shapes = nnx.to_pure_dict(shapes)
  if weights == "int8":
    shapes = int8_shapes(shapes)
  shardings = weight_shardings(layout.mesh, shapes, replicated=True)
  return layout, (ModelGraph(graph), layout, jax.tree.map(_shape, shapes, shardings))


def _shapes(layout: Layout, shapes: Any, *axes: str) -> Any:
  """The same shapes, with the sharding of named axes."""
  sharding = NamedSharding(layout.mesh, layout.spec(*axes))
  return jax.tree.map(lambda leaf: _shape(leaf, sharding), shapes)


def _shape(array, sharding):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
