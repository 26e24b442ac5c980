import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videochat_flash_jax.models.config import ConnectorConfig
from videochat_flash_jax.models.connector import Connector


@pytest.fixture(scope="module")
def connector():
  return Connector(ConnectorConfig(clip_tokens=6, merge_heads=2), 8, 4, rngs=nnx.Rngs(0))


def tokens(count):
  return jnp.asarray(np.random.default_rng(0).normal(size=(2, count, 8)), jnp.float32)


@pytest.mark.parametrize("count", [7, 16])
def test_a_clip_or_tile_merges_to_as_many_tokens_as_configured(connector, count):
  assert jax.jit(connector.__call__)(tokens(count)).shape == (2, 6, 4)


@pytest.mark.parametrize("count", [4, 6])
def test_a_tile_with_fewer_patches_keeps_them_all(connector, count):
  np.testing.assert_array_equal(connector.merge(tokens(count)), tokens(count))
  assert connector(tokens(count)).shape == (2, count, 4)
