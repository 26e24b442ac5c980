"""The Qwen2 decoder: grouped-query attention with biases on q, k and v, RoPE, SwiGLU, RMSNorm."""

import itertools

import jax.numpy as jnp
from flax import nnx
from qwix import QArray

from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerStack
from videochat_flash_jax.models.token_dropout import (
  DropoutPlan,
  drop_tokens,
  kept_positions,
  token_indices,
)
from videochat_flash_jax.ops.embedding import embed
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.ops.linear import Linear, float32_product
from videochat_flash_jax.ops.norms import RMSNorm
from videochat_flash_jax.ops.rope import apply_rope, rope_table
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.ops.swiglu import swiglu
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int


class Qwen2(nnx.Module):
  """Maps embedded tokens to hidden states, and hidden states to logits.

  Attributes:
    layers: a `LayerStack`, or a container with the same methods.
    cache_type: the class of the KV caches that fit `layers`.
  """

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
    self.cache_type = KVCache
    self.norm = RMSNorm(config.width, config.norm_eps, param_dtype=param_dtype)
    if not config.tied_embeddings:
      self.lm_head = Linear(
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
    """Computes the hidden states of whole sequences, as in training.

    Args:
      x: embedded sequences. Padding is at the end of a row, where no token attends to it.
      positions: rotary positions; 0, 1, 2... if None. Attention is causal in the order of the row,
        whatever the rotary positions are.
      segment_ids: segments of packed rows. A token attends to its own segment only.
      layout: how rows, tokens and weights are split over a mesh.

    Returns:
      Hidden states after the last norm.
    """
    if positions is None:
      positions = layout.to_zigzag(jnp.arange(x.shape[1])[None])
    (x,) = self.layers.run(self._apply_layer(positions, segment_ids, layout), (x,))
    return self.norm(x)

  def read_and_drop(
    self,
    x: Float[Array, "B T D"],
    plan: DropoutPlan,
    layout: Layout = ONE_DEVICE,
    positions: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """As `__call__`, but drops visual tokens between layers.

    Args:
      x: embedded sequences.
      plan: which tokens to drop before which layer (see `models/token_dropout.py`). Its arrays are
        in the order of the text.
      layout: how rows, tokens and weights are split over a mesh.
      positions: rotary positions before any drop, in the order of the text; see `kept_positions`.

    Returns:
      Hidden states of the kept tokens; and their indices in the row. Where a row keeps fewer than S
      tokens, the indices after them are T.
    """
    layers, kept = self.layers, token_indices(plan)
    for part, drop in _parts(plan, self.config.depth):
      if drop is not None:
        x, kept = self._drop(plan, drop, part.start, x, kept, layout, positions)
      segment_ids = layout.to_zigzag(gather_tokens(plan.segment_ids, kept))
      now_at = layout.to_zigzag(kept_positions(plan, kept, positions))
      apply = self._apply_layer(now_at, segment_ids, layout)
      (x,), layers = layers.run_part(apply, (x,), part)
    return self.norm(x), layout.to_zigzag(kept)

  def _apply_layer(self, positions, segment_ids, layout):
    """Returns the function that `LayerStack.run` applies: a layer, without a cache."""
    rope = self._rope(positions)

    def apply(layer, _, carry):
      """Gathers the weights of a layer and applies it to the hidden states."""
      layer = layout.gather_layer(layer, "decoder.layers.stacked")
      x = layout.constrain(carry[0], "batch", "sequence")
      return (layer(x, rope, lambda q, k, v: self_attention(q, k, v, segment_ids, layout)),)

    return apply

  def _drop(self, plan, drop, before_layer, x, kept, layout, positions=None):
    """Drops tokens of `x` before a layer, see `drop_tokens`."""

    def queries_and_keys(x):
      """Those of the first layer after the drop. Their attention ranks the tokens."""
      now_at = layout.to_zigzag(kept_positions(plan, kept, positions))
      return self.queries_and_keys(x, now_at, before_layer, layout)

    return drop_tokens(plan, drop, x, kept, queries_and_keys, layout)

  def queries_and_keys(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"],
    layer: int,
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Scaled queries, and keys, of one layer: their attention ranks visual tokens before it.

    Args:
      x: what enters the layer.
      positions: rotary positions of the tokens, in the order of the layout.
      layer: index of the layer.
      layout: how rows, tokens and weights are split over a mesh.
    """
    gathered = layout.gather_layer(self.layers.layer(layer), "decoder.layers.stacked")
    x = layout.constrain(x, "batch", "sequence")
    return gathered.project(x, self._rope(positions))[:2]

  def read(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache,
    num_tokens: Int[Array, "B"],
    *,
    layers: range | None = None,
    behind: tuple[KVCache, ...] = (),
    is_last_needed: bool = True,
    layout: Layout = ONE_DEVICE,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs a part of the layers on new tokens, and writes these into the part's cache.

    Args:
      x: what enters the first of the layers, right-padded. Every row of the cache must have T free
        slots.
      cache: of the tokens before, in these layers.
      num_tokens: number of tokens of each row of `x` without its padding.
      layers: consecutive layers; None: all.
      behind: caches of tokens before those of `cache`, which are not written; see `KVCache.attend`.
      is_last_needed: False if what leaves the last layer is not needed. Of that layer only keys and
        values are computed then.
      layout: how heads and weights are split over a mesh.

    Returns:
      What leaves the last layer (or enters it, if that is all that is needed); and the cache with
      the new tokens.
    """
    layers = range(self.config.depth) if layers is None else layers
    rope = self._rope(cache.positions(x.shape[1], behind))

    def apply(layer, index, carry):
      """Applies a layer to the hidden states and updates its part of the cache."""
      x, cache = carry

      def attend(q, k, v):
        """Attention over the caches and the new tokens."""
        nonlocal cache
        out, cache = cache.attend(index - layers.start, q, k, v, behind=behind, layout=layout)
        return out

      return layer(layout.constrain(x, "batch", cache.axes.length[1]), rope, attend), cache

    whole = layers if is_last_needed else layers[:-1]
    if len(whole) == self.config.depth:
      x, cache = self.layers.run(apply, (x, cache))
    else:
      (x, cache), _ = self.layers.run_part(apply, (x, cache), whole)
    if not is_last_needed:
      _, k, v = self.layers.layer(layers[-1]).project(x, rope)
      cache = cache.write(len(layers) - 1, k, v, layout)
    return x, cache.longer(num_tokens, x.shape[1])

  def forget(self, cache: KVCache, start: Int[Array, ""], num_tokens: Int[Array, ""]) -> KVCache:
    """Forgets some tokens of a cache; the tokens behind them move up.

    Keys are turned to the new positions of their tokens, which stay contiguous. What the layers
    above have read of the forgotten tokens stays in the other tokens (as in StreamingLLM, Xiao et
    al. 2024).

    Args:
      cache: of any layers, of one row, on one device.
      start: slot of the first token to forget.
      num_tokens: how many are forgotten.
    """
    back = self._rope(jnp.full((1, 1), -num_tokens), scores_grow=False)
    return cache.without(start, num_tokens, lambda k: apply_rope(k, *back))

  def _rope(self, positions, **options):
    config = self.config
    if config.yarn is not None:
      options["stretch"] = config.yarn.factor
      options["original_positions"] = config.yarn.original_positions
    return rope_table(positions, config.head_size, config.rope_theta, **options)

  def embed(
    self, token_ids: Int[Array, "B T"], layout: Layout = ONE_DEVICE
  ) -> Float[Array, "B T D"]:
    """Looks up text tokens. Ids below zero, those of visual slots, read token 0; see `embed`."""
    return embed(self.embed_tokens.embedding[...], token_ids, layout)

  @property
  def head(self) -> Float[Array, "D vocab"] | QArray:
    """The matrix that maps hidden states to logits."""
    if self.config.tied_embeddings:
      return self.embed_tokens.embedding[...].T
    return self.lm_head.kernel[...]

  def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
    """The score of every vocabulary id, in float32."""
    return float32_product(hidden, self.head)


def _parts(plan, depth):
  """The ranges of layers between drops, each with the drop before it. The first range has None."""
  drops = {0: None} if plan is None else {0: None, **plan.drops}
  parts = [range(*bounds) for bounds in itertools.pairwise([*drops, depth])]
  return list(zip(parts, drops.values(), strict=True))


class DecoderLayer(nnx.Module):
  """Pre-norm attention and SwiGLU MLP, each with a residual connection."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype):
    self.head_size, self.mlp_width = config.head_size, config.mlp_width
    queries = config.num_heads * config.head_size
    keys = config.num_kv_heads * config.head_size

    def linear(inputs, outputs, use_bias=False):
      """A linear layer in the dtype of the weights."""
      return Linear(inputs, outputs, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

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
    """Applies the layer.

    Args:
      x: hidden states.
      rope: cosines and sines of the tokens' rotary positions.
      attend: maps q, k and v to the output of the attention [B, T, N, H]. It knows the mask and
        the cache.
    """
    q, k, v = self.project(x, rope)
    x = x + self.o_proj(attend(q, k, v).reshape(*x.shape[:-1], -1))
    h = self.post_attention_norm(x)
    return x + swiglu(h, self.gate_proj, self.up_proj, self.down_proj, self.mlp_width)

  def project(self, x: Float[Array, "B T D"], rope) -> tuple[Array, Array, Array]:
    """Scaled queries [B, T, N, H], keys and values [B, T, K, H] of this layer's attention."""
    h = self.input_norm(x)
    heads = (*x.shape[:-1], -1, self.head_size)
    q = apply_rope(self.q_proj(h).reshape(heads), *rope, self.head_size**-0.5)
    k = apply_rope(self.k_proj(h).reshape(heads), *rope)
    return q, k, self.v_proj(h).reshape(heads)
