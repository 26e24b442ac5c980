"""The Qwen2 decoder: grouped-query attention with biases on q, k, v; RoPE; SwiGLU; RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerList, LayerStack
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.norms import RMSNorm
from videochat_flash_jax.ops.rope import apply_rope, rope_table
from videochat_flash_jax.ops.row_blocks import map_row_blocks
from videochat_flash_jax.shapes import Array, Float, Int


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
  ) -> Float[Array, "B T D"]:
    """Reads a whole sequence, as in training; returns the hidden states after the last norm.

    Args:
      x: embedded sequence. Padding stands at the end of a row, where nothing sees it.
      positions: rotary positions; 0, 1, 2... if None. A token sees itself and those before it
        in the row whatever the positions say.
      segment_ids: with packed rows, tokens see only their own segment.
    """
    if positions is None:
      positions = jnp.arange(x.shape[1])[None]
    rope = self._rope(positions)

    def apply(layer, _, carry):
      def attend(q, k, v):
        return attention(q, k, v, causal=True, query_segments=segment_ids, key_segments=segment_ids)

      return (layer(carry[0], rope, attend),)

    (x,) = self.layers.run(apply, (x,))
    return self.norm(x)

  def prefill(
    self, x: Float[Array, "B T D"], length: Int[Array, "B"], num_slots: int
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Reads right-padded prompts into a new cache.

    Args:
      x: embedded prompts.
      length: tokens of each row that count; the rest is padding.
      num_slots: slots of the new cache, at least T.

    Returns:
      Hidden states after the last norm, and the cache.
    """
    apart = isinstance(self.layers, LayerList)
    cache = KVCache.empty(self.config, x.shape[0], num_slots, apart=apart, dtype=x.dtype)
    hidden, cache = self._read(x, cache, new_only=True)
    return hidden, cache._replace(length=length.astype(jnp.int32))

  def extend(
    self, x: Float[Array, "B T D"], cache: KVCache, length: Int[Array, "B"]
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Reads more tokens after those in the cache: a decoded token, or the next turn of a chat.

    Args:
      x: embedded tokens, right-padded. The cache must have T free slots in every row.
      cache: what was read before.
      length: tokens of each row of `x` that count.

    Returns:
      Hidden states after the last norm, and the longer cache.
    """
    hidden, longer = self._read(x, cache, new_only=False)
    return hidden, longer._replace(length=cache.length + length.astype(jnp.int32))

  def _read(self, x, cache, new_only):
    order = cache.length[:, None] + jnp.arange(x.shape[1])[None]
    rope = self._rope(order)

    def apply(layer, index, carry):
      x, cache = carry

      def attend(q, k, v):
        nonlocal cache
        cache = cache.write(index, k, v)
        if new_only:  # nothing stands before, and attention in array order is cheaper
          return attention(q, k, v, causal=True)
        return attention(q, *cache.read(index), causal=True, query_order=order)

      return layer(x, rope, attend), cache

    x, cache = self.layers.run(apply, (x, cache))
    return self.norm(x), cache

  def _rope(self, positions):
    config, yarn = self.config, {}
    if config.yarn is not None:
      yarn = {"stretch": config.yarn.factor, "original_positions": config.yarn.original_positions}
    return rope_table(positions, config.head_size, config.rope_theta, **yarn)

  def embed(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks up text tokens; ids below zero (visual slots, padding) read token 0."""
    return self.embed_tokens(jnp.maximum(token_ids, 0))

  def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
    """Scores every token of the vocabulary, in float32."""
    if self.config.tied_embeddings:
      weights = self.embed_tokens.embedding[...]
      return jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32)
    weights = self.lm_head.kernel[...]
    return jnp.einsum("...d,dv->...v", hidden, weights, preferred_element_type=jnp.float32)


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
    h = self.input_norm(x)
    heads = (*x.shape[:-1], -1, self.head_size)
    q = apply_rope(self.q_proj(h).reshape(heads), *rope)
    k = apply_rope(self.k_proj(h).reshape(heads), *rope)
    v = self.v_proj(h).reshape(heads)
    x = x + self.o_proj(attend(q, k, v).reshape(*x.shape[:-1], -1))
    rows = x.reshape(-1, x.shape[-1])
    return x + map_row_blocks(self._mlp, rows, self.mlp_width).reshape(x.shape)

  def _mlp(self, x):
    h = self.post_attention_norm(x)
    return self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h))
