"""`vcflash bench prefill`: reading many visual tokens, chunk after chunk.

The peer is our own decoder that reads all of them in one program. It has no chunks to put together,
but needs memory for the activations of all tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from videochat_flash_jax.benchmarks.comparison import Phase, compare, random_weights
from videochat_flash_jax.benchmarks.decode import QWEN2_1_5B_LAYERS, prefill_work
from videochat_flash_jax.benchmarks.floors import FLOAT_BYTES, Work
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.prefix import CHUNK, Prefix
from videochat_flash_jax.inference.programs import Tokens
from videochat_flash_jax.models.config import DecoderConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

TINY = VideoChatFlashConfig.tiny().decoder


class Prompt(NamedTuple):
  """A decoder, and how many visual tokens it reads."""

  config: DecoderConfig
  num_tokens: int


PROMPTS = {
  "tiny": Prompt(TINY, 60_000),
  "qwen2_1_5b, 4 layers": Prompt(
    dataclasses.replace(QWEN2_1_5B_LAYERS, vocab_size=TINY.vocab_size), 8192
  ),
}


def run(repeats: int = 1, *, prompts: Mapping[str, Prompt] = PROMPTS) -> dict[str, Any]:
  """Reads random visual tokens, with random weights."""
  phases = {name: _phase(prompt) for name, prompt in prompts.items()}
  shapes = {f"{name}: tokens": prompt.num_tokens for name, prompt in prompts.items()}
  return compare(
    "prefill",
    phases,
    shapes=shapes | {"chunk": CHUNK},
    repeats=repeats,
    peer="ours, all tokens in one program",
  )


def prefix_work(config: DecoderConfig, tokens: float) -> Work:
  """The least work of reading tokens into caches: of the last layer only keys and values count."""
  below = prefill_work(dataclasses.replace(config, depth=config.depth - 1), tokens)
  values = config.width * 2 * config.num_kv_heads * config.head_size
  cache = tokens * 2 * config.num_kv_heads * config.head_size
  return Work(below.flops + 2 * tokens * values, below.bytes + (values + cache) * FLOAT_BYTES)


def _phase(prompt: Prompt) -> Phase:
  """The reading of one prompt, in chunks and at once."""
  config = dataclasses.replace(
    VideoChatFlashConfig.tiny(),
    decoder=dataclasses.replace(prompt.config, max_positions=2 * prompt.num_tokens),
  )
  model = nnx.merge(*random_weights(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0))))
  engine, layers = Engine(model, stop_ids=()), range(prompt.config.depth)
  rng, size = np.random.default_rng(0), prompt.num_tokens
  visual_tokens = rng.standard_normal((size, prompt.config.width), np.float32)

  def in_chunks():
    """Reads as `watch` does when visual tokens are faster than their reading."""
    prefix = Prefix(engine)
    prefix.expect(size)
    prefix.add_visual(visual_tokens)
    prefix.settle()
    return prefix.caches

  def at_once():
    """Reads one piece with all tokens."""
    cache = engine.empty_prefix_cache(layers, -(-size // CHUNK) * CHUNK)
    entering = Tokens(np.zeros(size, np.int32), visual_tokens, np.arange(size, dtype=np.int32))
    return engine.read_part(layers, [entering], cache, sizes=[(size, size)])[0]

  return Phase(in_chunks, prefix_work(prompt.config, size), at_once)
