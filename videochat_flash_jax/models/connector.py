"""Clip-level HiCo: merges the tokens of a clip, then maps them to the decoder's width.

Source: `tome16_mlp_hd64` of OpenGVLab/VideoChat-Flash.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.models.config import ConnectorConfig
from videochat_flash_jax.models.token_merging import merge_tokens
from videochat_flash_jax.ops.linear import Linear
from videochat_flash_jax.shapes import Array, Float


class Connector(nnx.Module):
  """Token merging, then an MLP of two linear layers with a GELU between."""

  def __init__(
    self,
    config: ConnectorConfig,
    width: int,
    out_width: int,
    *,
    rngs: nnx.Rngs,
    param_dtype=jnp.float32,
  ):
    self.config = config
    self.fc1 = Linear(width, out_width, param_dtype=param_dtype, rngs=rngs)
    self.fc2 = Linear(out_width, out_width, param_dtype=param_dtype, rngs=rngs)

  def merge(self, x: Float[Array, "C P E"]) -> Float[Array, "C V E"]:
    """Merges the tokens of each clip or image tile, without parameters."""
    target = self.config.num_tokens(x.shape[1])
    return merge_tokens(x, target=target, num_heads=self.config.merge_heads)

  def project(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch D"]:
    """Maps merged tokens to the decoder's width."""
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))

  def __call__(self, x: Float[Array, "C P E"]) -> Float[Array, "C V D"]:
    """Merges the tokens, then projects them."""
    return self.project(self.merge(x))
