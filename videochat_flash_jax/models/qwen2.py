"""The Qwen2 decoder: grouped-query attention with biases on q, k, v; RoPE; SwiGLU; RMSNorm."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerList, LayerStack
from videochat_flash_jax.models.token_dropout import (
  DropoutPlan,
  drop_tokens,
  every_token,
  segment_positions,
)
from videochat_flash_jax.ops.embedding import embed
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.ops.norms import RMSNorm
from videochat_flash_jax.ops.rope import apply_rope, rope_table
from videochat_flash_jax.ops.row_blocks import map_row_blocks
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int

Caches = tuple[KVCache, ...]  # one for each part of the layers that sees the same tokens


class Qwen2(nnx.Module):
  """Embedded tokens to hidden states, and hidden states to logits."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.config = config
    self.embed_tokens = nnx.Embed(
      config.vocab_size,
      config.width,
      param_dtype=param_dtype,
      rngs=rngs,
      embedding_init=nnx.initializers.normal(config.width**-0.5),
    )
    self.layers = LayerStack(
      lambda rngs: DecoderLayer(config, rngs=rngs, param_dtype=param_dtype),
      config.depth,
      rngs=rngs,
    )
    self.norm = RMSNorm(config.width, config.norm_eps, param_dtype=param_dtype)
    if not config.tied_embeddings:
      self.lm_head = nnx.Linear(
        config.width, config.vocab_size, use_bias=False, param_dtype=param_dtype, rngs=rngs
      )

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    layout: Layout = ONE_DEVICE,
  ) -> Float[Array, "B T D"]:
    """Reads a whole sequence, as in training; returns the hidden states after the last norm.

    Args:
      x: embedded sequence. Padding stands at the end of a row, where nothing sees it.
      positions: rotary positions; 0, 1, 2... if None. A token sees itself and those before it
        in the row whatever the positions say.
      segment_ids: with packed rows, tokens see only their own segment.
      layout: how rows, tokens and weights lie on a mesh.
    """
    if positions is None:
      positions = layout.to_zigzag(jnp.arange(x.shape[1])[None])
    (x,) = self.layers.run(self._reader(positions, segment_ids, layout), (x,))
    return self.norm(x)

  def read_and_drop(
    self, x: Float[Array, "B T D"], plan: DropoutPlan, layout: Layout = ONE_DEVICE
  ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """As `__call__`, dropping visual tokens on the way; positions are counted in each segment.

    Args:
      x: embedded sequence.
      plan: what to drop where (see `models/token_dropout.py`), in the order of the text.
      layout: how rows, tokens and weights lie on a mesh.

    Returns:
      Hidden states of the tokens that are left, and their indices in the row; behind them, where
      another row has more, the row's length.
    """
    layers, kept = self.layers, every_token(plan)
    for part, drop in _parts(plan, self.config.depth):
      if drop is not None:
        x, kept = self._drop(plan, drop, part.start, x, kept, layout)
      segment_ids = gather_tokens(plan.segment_ids, kept)
      positions = layout.to_zigzag(segment_positions(segment_ids))
      apply = self._reader(positions, layout.to_zigzag(segment_ids), layout)
      (x,), layers = layers.run_part(apply, (x,), part)
    return self.norm(x), layout.to_zigzag(kept)

  def _reader(self, positions, segment_ids, layout):
    rope = self._rope(positions)

    def apply(layer, _, carry):
      layer = layout.gather_layer(layer, "decoder.layers.stacked")
      x = layout.constrain(carry[0], "batch", "sequence")
      return (layer(x, rope, lambda q, k, v: self_attention(q, k, v, segment_ids, layout)),)

    return apply

  def _drop(self, plan, drop, before_layer, x, kept, layout):
    def queries_and_keys(x):
      positions = segment_positions(gather_tokens(plan.segment_ids, kept))
      layer = layout.gather_layer(self.layers.layer(before_layer), "decoder.layers.stacked")
      x = layout.constrain(x, "batch", "sequence")
      return layer.project(x, self._rope(layout.to_zigzag(positions)))[:2]

    return drop_tokens(plan, drop, x, kept, queries_and_keys, layout)

  def prefill(
    self,
    x: Float[Array, "B T D"],
    length: Int[Array, "B"],
    num_slots: int,
    plan: DropoutPlan | None = None,
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B S D"], Caches]:
    """Reads right-padded prompts into new caches.

    Args:
      x: embedded prompts.
      length: tokens of each row that count; the rest is padding.
      num_slots: slots of the first cache, at least T; the others have as many to spare.
      plan: visual tokens to drop on the way.
      layout: how rows, heads and weights lie on a mesh; `sequence` must be 1.

    Returns:
      Hidden states after the last norm, of the tokens that are left, and a cache for each part
      of the layers: one, and one more for each drop.
    """
    spare, row_length = num_slots - x.shape[1], x.shape[1]
    kept = None if plan is None else every_token(plan)
    caches = []
    for part, drop in _parts(plan, self.config.depth):
      if drop is not None:
        x, kept = self._drop(plan, drop, part.start, x, kept, layout)
        length = (kept < row_length).sum(axis=1)
      (batch, num_tokens, _), apart = x.shape, isinstance(self.layers, LayerList)
      cache = KVCache.empty(
        self.config, batch, num_tokens + spare, apart=apart, depth=len(part), dtype=x.dtype
      )
      x, cache = self._read(x, cache, part, layout, is_empty=True)
      caches.append(cache._replace(length=length.astype(jnp.int32)))
    return self.norm(x), tuple(caches)

  def extend(
    self,
    x: Float[Array, "B T D"],
    caches: Caches,
    length: Int[Array, "B"],
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B T D"], Caches]:
    """Reads more tokens after those in the caches: a decoded token, or the next turn of a chat.

    Args:
      x: embedded tokens, right-padded. Every cache must have T free slots in every row.
      caches: what was read before.
      length: tokens of each row of `x` that count.
      layout: as of `prefill`.

    Returns:
      Hidden states after the last norm, and the longer caches.
    """
    longer, first = [], 0
    for cache in caches:
      x, read = self._read(x, cache, range(first, first + cache.depth), layout)
      longer.append(read._replace(length=cache.length + length.astype(jnp.int32)))
      first += cache.depth
    return self.norm(x), tuple(longer)

  def _read(self, x, cache, part, layout, is_empty=False):
    rope = self._rope(cache.length[:, None] + jnp.arange(x.shape[1])[None])

    def apply(layer, index, carry):
      x, cache = carry

      def attend(q, k, v):
        nonlocal cache
        in_part = index - part.start
        mixed, cache = cache.attend(in_part, q, k, v, is_empty=is_empty, layout=layout)
        return mixed

      return layer(layout.constrain(x, "batch", "sequence"), rope, attend), cache

    if len(part) == self.config.depth:
      return self.layers.run(apply, (x, cache))
    return self.layers.run_part(apply, (x, cache), part)[0]

  def _rope(self, positions):
    config, yarn = self.config, {}
    if config.yarn is not None:
      yarn = {"stretch": config.yarn.factor, "original_positions": config.yarn.original_positions}
    return rope_table(positions, config.head_size, config.rope_theta, **yarn)

  def embed(
    self, token_ids: Int[Array, "B T"], layout: Layout = ONE_DEVICE
  ) -> Float[Array, "B T D"]:
    """Looks up text tokens; ids below zero (visual slots, padding) read token 0."""
    return embed(self.embed_tokens.embedding[...], jnp.maximum(token_ids, 0), layout)

  @property
  def head(self) -> Float[Array, "D vocab"]:
    """What scores the tokens of the vocabulary."""
    if self.config.tied_embeddings:
      return self.embed_tokens.embedding[...].T
    return self.lm_head.kernel[...]

  def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
    """Scores every token of the vocabulary, in float32."""
    return jnp.einsum("...d,dv->...v", hidden, self.head, preferred_element_type=jnp.float32)


def _parts(plan, depth):
  """Layers that see equally many tokens, each with the drop before them; the first has none."""
  drops = {0: None} if plan is None else {0: None, **plan.drops}
  parts = [range(*edges) for edges in itertools.pairwise([*drops, depth])]
  return list(zip(parts, drops.values(), strict=True))


class DecoderLayer(nnx.Module):
  """Attention and SwiGLU, each behind a norm and beside a residual."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype):
    self.head_size, self.mlp_width = config.head_size, config.mlp_width
    queries = config.num_heads * config.head_size
    keys = config.num_kv_heads * config.head_size

    def linear(inputs, outputs, use_bias=False):
      return nnx.Linear(inputs, outputs, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

    self.input_norm = RMSNorm(config.width, config.norm_eps, param_dtype=param_dtype)
    self.q_proj = linear(config.width, queries, use_bias=True)
    self.k_proj = linear(config.width, keys, use_bias=True)
    self.v_proj = linear(config.width, keys, use_bias=True)
    self.o_proj = linear(queries, config.width)
    self.post_attention_norm = RMSNorm(config.width, config.norm_eps, param_dtype=param_dtype)
    self.gate_proj = linear(config.width, config.mlp_width)
    self.up_proj = linear(config.width, config.mlp_width)
    self.down_proj = linear(config.mlp_width, config.width)

  def __call__(self, x: Float[Array, "B T D"], rope, attend) -> Float[Array, "B T D"]:
    """One layer.

    Args:
      x: hidden states.
      rope: cosines and sines of the tokens' positions.
      attend: maps new q, k, v to mixed values; it knows the mask and the cache.
    """
    q, k, v = self.project(x, rope)
    x = x + self.o_proj(attend(q, k, v).reshape(*x.shape[:-1], -1))
    return x + map_row_blocks(self._mlp, x, self.mlp_width, row_axes=2)

  def project(self, x: Float[Array, "B T D"], rope) -> tuple[Array, Array, Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of this layer's attention."""
    h = self.input_norm(x)
    heads = (*x.shape[:-1], -1, self.head_size)
    q = apply_rope(self.q_proj(h).reshape(heads), *rope)
    k = apply_rope(self.k_proj(h).reshape(heads), *rope)
    return q, k, self.v_proj(h).reshape(heads)

  def _mlp(self, x):
    h = self.post_attention_norm(x)
    return self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h))
