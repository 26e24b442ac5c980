"""`vcflash bench merge`: token merging of clips, the first part of the connector, beside ToMe."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.benchmarks.comparison import Phase, compare, installed
from videochat_flash_jax.benchmarks.floors import FLOAT_BYTES, Work
from videochat_flash_jax.benchmarks.tome_peer import ToMePeer
from videochat_flash_jax.models.token_merging import merge_schedule, merge_tokens


def run(
  repeats: int = 10,
  *,
  clips: int = 16,
  tokens: int = 784,
  target: int = 64,
  width: int = 1024,
  num_heads: int = 16,
) -> dict[str, Any]:
  """Merges random tokens [clips, tokens, width]; the default sizes are those of UMT-L at 224 px."""
  rng = np.random.default_rng(0)
  tokens_of_clips = rng.standard_normal((clips, tokens, width), np.float32)
  x = jnp.asarray(tokens_of_clips)
  merge = jax.jit(lambda x: merge_tokens(x, target=target, num_heads=num_heads))
  peer = ToMePeer(tokens_of_clips, target, num_heads) if installed("torch") else None
  work = clip_work(tokens, target, width, num_heads)
  work = Work(clips * work.flops, clips * work.bytes)
  phases = {"merge": Phase(lambda: merge(x), work, peer and peer.merge)}
  shapes = {
    "clips": clips, "tokens": tokens, "target": target, "width": width, "num_heads": num_heads,
  }  # fmt: skip
  return compare("merge", phases, shapes=shapes, repeats=repeats, peer=peer and peer.name)


def clip_work(tokens: int, target: int, width: int, num_heads: int) -> Work:
  """The least work of one clip: the similarities of each round, and two additions per token.

  Our code averages tokens by a matrix product, but only the additions are unavoidable and count.
  """
  flops, remaining = 2 * tokens * width, tokens
  for removed in merge_schedule(tokens, target):
    destinations = remaining // 2
    flops += 2 * (remaining - destinations) * destinations * (width // num_heads)
    remaining -= removed
  return Work(flops, (tokens + target) * width * FLOAT_BYTES)
