"""The engine's jitted programs.

On a mesh, heads (and so the caches), MLP and vocabulary are split over `tensor`, and clips over all
axes. The tokens of a video, and their slots in its caches, are split over `data`, `fsdp` and
`sequence`. Rows and weights are replicated over these, so that no weight is sent between devices
while an answer is written.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.inference.sampler import sample
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.blockwise import NOTHING
from videochat_flash_jax.ops.precision import dtype_of_products, exact_products
from videochat_flash_jax.ops.received_attention import scores_of
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.shapes import Array, Bool, Float, Int, UInt8

DECODE_STEPS = 16  # tokens decoded on the device before the host reads them
NO_TOKEN = -1


class ModelGraph:
  """A model without its weights. It knows its hash, which every call of a program needs.

  NNX would compute it each time, which takes milliseconds, as a question to a small model does.
  """

  def __init__(self, graph: nnx.GraphDef):
    """Takes the graph that `nnx.split` gives."""
    self._graph, self._hash = graph, hash(graph)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ModelGraph) and self._graph == other._graph

  def merge(self, weights: dict) -> VideoChatFlash:
    """The model with weights."""
    return nnx.merge(self._graph, weights)


def _program(**options: Any) -> Callable:
  """As `jax.jit`; where weights are float32, the products of the program are exact."""

  def jitted(function):
    """The jitted program of a function of a graph, a layout, weights and other arguments."""

    @functools.wraps(function)
    def exact(graph, layout, weights, *arguments, **named):
      with exact_products(dtype_of_products(weights)):
        return function(graph, layout, weights, *arguments, **named)

    return jax.jit(exact, **options)

  return jitted


@_program(static_argnames=("graph", "layout"))
def encode(
  graph: ModelGraph, layout: Layout, weights: dict, clips: UInt8[Array, "R C F S S 3"]
) -> Float[Array, "V D"]:
  """Visual tokens of clips, replicated on every device. See `VideoChatFlash.encode_rows`."""
  tokens = graph.merge(weights).encode_rows(clips, layout)
  return layout.constrain(tokens.reshape(-1, tokens.shape[-1]))


@_program(static_argnames=("graph", "layout"))
def encode_features(
  graph: ModelGraph, layout: Layout, weights: dict, clips: UInt8[Array, "R C F S S 3"]
) -> Float[Array, "N V E"]:
  """The features of N = R C clips that a feature store keeps, replicated on every device."""
  features = graph.merge(weights).encode_features(clips, layout)
  features = features.reshape(-1, *features.shape[2:])
  return layout.constrain(features.astype(jnp.bfloat16))


@_program(static_argnames=("graph", "layout"))
def project(
  graph: ModelGraph, layout: Layout, weights: dict, features: Float[Array, "R C V E"]
) -> Float[Array, "W D"]:
  """As `encode`, from the features of `encode_features`."""
  tokens = graph.merge(weights).project_rows(features, layout)
  return layout.constrain(tokens.reshape(-1, tokens.shape[-1]))


class Tokens(NamedTuple):
  """Tokens that enter the first layer, right-padded: text, and visual tokens at their positions.

  Attributes:
    token_ids: of the text.
    visual_tokens: the visual token at each position; any values where text stands.
    visual_index: the position itself where a visual token stands; -1 for text.
  """

  token_ids: Int[Array, "B T"]
  visual_tokens: Float[Array, "B T D"]
  visual_index: Int[Array, "B T"]


@_program(static_argnames=("graph", "layout", "layers", "wanted"), donate_argnames="cache")
def read(
  graph: ModelGraph,
  layout: Layout,
  weights: dict,
  entering: Tokens | Float[Array, "B T D"],
  num_tokens: Int[Array, "B"],
  cache: KVCache,
  behind: tuple[KVCache, ...],
  layers: range,
  wanted: str,
) -> tuple[KVCache, Array | None]:
  """Reads tokens into the cache of a part of the layers.

  Args:
    graph: of the model.
    layout: how arrays are split over the mesh.
    weights: of the model, as nested dicts.
    entering: tokens; or what left the part before, if `layers` are not the first ones.
    num_tokens: number of tokens of each row without its padding.
    cache: of the tokens before, in these layers, with T free slots.
    behind: see `Qwen2.read`.
    layers: the part.
    wanted: "states", what leaves the part [B, T, D]; "logits", those of the token after the last
      one of each row [B, vocab]; "" for nothing but the cache, which takes less work.

  Returns:
    The cache with the new tokens, and what is wanted.
  """
  model = graph.merge(weights)
  if isinstance(entering, Tokens):
    entering = model.embed_sequence(*entering, layout)
  states, cache = model.decoder.read(
    entering,
    cache,
    num_tokens,
    layers=layers,
    behind=behind,
    is_last_needed=bool(wanted),
    layout=layout,
  )
  if wanted == "logits":
    return cache, _logits_of_last(model.decoder, states, num_tokens, layout)
  return cache, layout.constrain(states) if wanted == "states" else None


@_program(static_argnames=("graph", "layout"), donate_argnames="cache")
def forget(
  graph: ModelGraph,
  layout: Layout,
  weights: dict,
  cache: KVCache,
  start: Int[Array, ""],
  num_tokens: Int[Array, ""],
) -> KVCache:
  """A cache without some of its tokens; see `Qwen2.forget`."""
  return graph.merge(weights).decoder.forget(cache, start, num_tokens)


@_program(static_argnames=("graph", "layout", "layer"))
def last_queries(
  graph: ModelGraph,
  layout: Layout,
  weights: dict,
  states: Float[Array, "B T D"],
  num_tokens: Int[Array, "B"],
  start: Int[Array, ""],
  layer: int,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N T"]]:
  """The query of the last token of each row in a layer, and its scores for all tokens of the row.

  Args:
    graph: see `read`.
    layout: see `read`.
    weights: see `read`.
    states: what enters the layer.
    num_tokens: number of tokens of each row without its padding, whose scores are `NOTHING`.
    start: rotary position of the first token.
    layer: index of the layer.
  """
  decoder = graph.merge(weights).decoder
  positions = start + jnp.arange(states.shape[1])[None]
  q, k = decoder.queries_and_keys(states, positions, layer, layout)
  last = jnp.take_along_axis(q, (num_tokens - 1)[:, None, None, None], axis=1)[:, 0]
  is_token = jnp.arange(states.shape[1]) < num_tokens[:, None]
  scores = jnp.where(is_token[:, None], scores_of(last, k), NOTHING)
  return layout.constrain(last), layout.constrain(scores)


@_program(static_argnames=("graph", "layout", "layer"))
def score(
  graph: ModelGraph,
  layout: Layout,
  weights: dict,
  queries: Float[Array, "B N H"],
  states: Float[Array, "1 T D"],
  start: Int[Array, ""],
  layer: int,
) -> Float[Array, "B N T"]:
  """Scores of tokens that all queries stand behind. The arguments are those of `last_queries`."""
  decoder = graph.merge(weights).decoder
  positions = start + jnp.arange(states.shape[1])[None]
  _, k = decoder.queries_and_keys(states, positions, layer, layout)
  return layout.constrain(scores_of(queries, k))


def _logits_of_last(decoder, states, num_tokens, layout):
  """Logits of the token after the last one of each row; any where a row has no token."""
  index = jnp.maximum(num_tokens - 1, 0)[:, None, None]
  last = jnp.take_along_axis(states, index, axis=1)[:, 0]
  return _logits(decoder, decoder.norm(last), layout)


@_program(static_argnames=("graph", "layout"), donate_argnames=("caches", "logits"))
def decode(
  graph: ModelGraph,
  layout: Layout,
  weights: dict,
  caches: tuple[KVCache, ...],
  behind: tuple[tuple[KVCache, ...], ...],
  logits: Float[Array, "B vocab"],
  finished: Bool[Array, "B"],
  stop_ids: Int[Array, "S"],
  key: Array,
  temperature: float,
  top_p: float,
  num_steps: int,
) -> tuple[Int[Array, "B steps"], tuple[KVCache, ...], Float[Array, "B vocab"], Bool[Array, "B"]]:
  """Decodes up to `num_steps` (at most `DECODE_STEPS`) tokens per row.

  Args:
    graph: of the model.
    layout: how arrays are split over the mesh.
    weights: of the model, as nested dicts.
    caches: of the tokens that the rows have read, one for each part of the layers.
    behind: for each part, the caches that the rows stand behind; see `Qwen2.read`.
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
  decoder = graph.merge(weights).decoder

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
    x, first, longer = decoder.embed(token[:, None], layout), 0, []
    for cache, before in zip(caches, behind, strict=True):
      layers = range(first, first + cache.depth)
      x, cache = decoder.read(x, cache, num_read, layers=layers, behind=before, layout=layout)
      longer.append(cache)
      first += cache.depth
    finished = finished | (token[:, None] == stop_ids).any(axis=-1)
    logits = _logits(decoder, decoder.norm(x[:, 0]), layout)
    return step + 1, tokens, tuple(longer), logits, finished

  tokens = jnp.full((len(finished), DECODE_STEPS), NO_TOKEN, jnp.int32)
  state = (0, tokens, caches, logits, finished)
  tokens, *after, finished = jax.lax.while_loop(unfinished, one_token, state)[1:]
  # The host reads them, and on several hosts it can read only what its own devices have.
  return layout.constrain(tokens), *after, layout.constrain(finished)


def _logits(decoder: Qwen2, hidden, layout):
  return layout.constrain(decoder.logits(hidden), "batch", "vocabulary")


def bucket(size: int, smallest: int = 64) -> int:
  """Rounds a size up to 64, 96, 128, 192, 256, 384... From 64 on this adds less than a half."""
  step = smallest
  while step < size:
    step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
  return step
