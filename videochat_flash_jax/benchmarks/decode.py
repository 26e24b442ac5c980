"""`vcflash bench decode`: reading a long prompt and writing after it, beside `transformers`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.benchmarks.comparison import (
  Phase,
  compare,
  installed,
  random_weights,
)
from videochat_flash_jax.benchmarks.floors import FLOAT_BYTES, Work
from videochat_flash_jax.benchmarks.qwen2_peer import Qwen2Peer
from videochat_flash_jax.inference.cpu_layers import unstack_decoder
from videochat_flash_jax.models.config import DecoderConfig
from videochat_flash_jax.models.qwen2 import Qwen2

# Four layers of Qwen2 1.5B, without its vocabulary: embedded tokens in, hidden states out.
QWEN2_1_5B_LAYERS = DecoderConfig(
  vocab_size=1, width=1536, depth=4, num_heads=12, num_kv_heads=2, head_size=128, mlp_width=8960,
  tied_embeddings=True,
)  # fmt: skip


def run(
  repeats: int = 3,
  *,
  prompt_tokens: int = 4096,
  new_tokens: int = 32,
  config: DecoderConfig = QWEN2_1_5B_LAYERS,
) -> dict[str, Any]:
  """Reads a random prompt into a cache, then decodes: each hidden state is the next input."""
  rng = np.random.default_rng(0)
  prompt = rng.standard_normal((1, prompt_tokens, config.width), np.float32)
  ours = _Decoder(config, prompt, new_tokens)
  peer = Qwen2Peer(config, prompt, new_tokens) if installed("torch", "transformers") else None
  phases = {
    "prefill": Phase(ours.prefill, prefill_work(config, prompt_tokens), peer and peer.prefill),
    "decode_token": Phase(
      ours.decode,
      decode_work(config, prompt_tokens + new_tokens // 2),
      peer and peer.decode,
      count=new_tokens,
    ),
  }
  shapes = {
    "batch": 1, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "depth": config.depth,
    "width": config.width, "num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads,
    "head_size": config.head_size, "mlp_width": config.mlp_width,
  }  # fmt: skip
  return compare("decode", phases, shapes=shapes, repeats=repeats, peer=peer and peer.name)


class _Decoder:
  """Our decoder. On a CPU its layers are unstacked, as `inference.engine` keeps them."""

  def __init__(self, config: DecoderConfig, prompt: np.ndarray, new_tokens: int):
    model = nnx.merge(*random_weights(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    if jax.default_backend() == "cpu":
      unstack_decoder(model)
    graph, self._weights = nnx.split(model)
    self._prompt, self._cache = jnp.asarray(prompt), None
    num_slots = prompt.shape[1] + new_tokens

    def read(weights, x, cache):
      decoder = nnx.merge(graph, weights)
      x, cache = decoder.read(x, cache, jnp.array([x.shape[1]]))
      return decoder.norm(x), cache

    def prefill(weights, prompt):
      empty = model.cache_type.empty(config, 1, num_slots, depth=config.depth)
      return read(weights, prompt, empty)

    def decode(weights, cache):
      def one_token(_, state):
        return read(weights, *state)

      x = jnp.ones((1, 1, config.width))
      return jax.lax.fori_loop(0, new_tokens, one_token, (x, cache))

    self._prefill, self._decode = jax.jit(prefill), jax.jit(decode, donate_argnums=1)

  def prefill(self):
    """Reads the prompt."""
    # The hidden states are asked for, too, else the compiler would leave out most of a layer.
    hidden, self._cache = self._prefill(self._weights, self._prompt)
    return hidden

  def decode(self):
    """Decodes after the prompt read last; once only."""
    hidden, _ = self._decode(self._weights, self._cache)
    return hidden


def _layer_weights(config):
  """Values of one layer's matrices."""
  heads = config.num_heads + config.num_kv_heads
  return config.width * (2 * heads * config.head_size + 3 * config.mlp_width)


def prefill_work(config: DecoderConfig, tokens: int) -> Work:
  """Matrix products of all tokens, and causal attention; weights read and the cache written."""
  weights, cache = config.depth * _layer_weights(config), _cache_values(config, tokens)
  seen = tokens * (tokens + 1) / 2
  attention = config.depth * 4 * seen * config.num_heads * config.head_size
  return Work(2 * tokens * weights + attention, (weights + cache) * FLOAT_BYTES)


def decode_work(config: DecoderConfig, tokens_before: int) -> Work:
  """One token: weights and cache read."""
  weights, cache = config.depth * _layer_weights(config), _cache_values(config, tokens_before)
  attention = config.depth * 4 * tokens_before * config.num_heads * config.head_size
  return Work(2 * weights + attention, (weights + cache) * FLOAT_BYTES)


def _cache_values(config, tokens):
  return 2 * config.depth * tokens * config.num_kv_heads * config.head_size
