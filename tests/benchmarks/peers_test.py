"""The peers in torch compute what we compute, so that their times can be compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from videochat_flash_jax.benchmarks.comparison import random_weights
from videochat_flash_jax.benchmarks.tome_peer import ToMePeer
from videochat_flash_jax.benchmarks.umt_peer import UMTPeer
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.token_merging import merge_tokens
from videochat_flash_jax.models.umt import UMT

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("tokens, target", [(784, 64), (16, 4), (6, 4), (6, 6)])
def test_tokens_merged_by_the_peer_are_ours(tokens, target):
  x = np.random.default_rng(0).standard_normal((2, tokens, 64), np.float32)
  ours = jax.jit(lambda x: merge_tokens(x, target=target, num_heads=4))(jnp.asarray(x))
  theirs = ToMePeer(x, target, num_heads=4).merge()
  assert_close(ours, theirs.numpy(), relative=2e-6)


def test_clips_encoded_by_the_peer_are_ours():
  config = VideoChatFlashConfig.tiny().vision
  graph, weights = random_weights(lambda: UMT(config, rngs=nnx.Rngs(0)))
  shape = 2, config.clip_frames, config.image_size, config.image_size, 3
  pixels = np.random.default_rng(1).standard_normal(shape, np.float32)
  ours = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))(weights, pixels)
  theirs = UMTPeer(config, nnx.to_pure_dict(weights), pixels).encode()
  assert_close(ours, theirs.numpy(), relative=2e-5)
