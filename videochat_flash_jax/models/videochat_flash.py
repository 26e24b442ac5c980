"""The paper's figure as code: encode clips, compress them, splice them into text, decode."""

import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import PIXEL_MEAN, PIXEL_STD, VideoChatFlashConfig
from videochat_flash_jax.models.connector import Connector
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.splice import splice
from videochat_flash_jax.models.umt import UMT
from videochat_flash_jax.shapes import Array, Float, Int, UInt8

_ENCODERS = {"umt": UMT}


class VideoChatFlash(nnx.Module):
  """Video ViT, connector and decoder.

  All computation is done in the dtype of the weights, but for norms, softmax, rotary positions,
  token similarity and logits, which are float32.
  """

  def __init__(self, config: VideoChatFlashConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    if config.vision.kind not in _ENCODERS:
      raise InputError(
        f"vision encoder '{config.vision.kind}' of {config.name} is not built yet; "
        f"available: {', '.join(_ENCODERS)}"
      )
    self.config = config
    self.vision = _ENCODERS[config.vision.kind](config.vision, rngs=rngs, param_dtype=param_dtype)
    self.connector = Connector(
      config.connector,
      config.vision.width,
      config.decoder.width,
      rngs=rngs,
      param_dtype=param_dtype,
    )
    self.decoder = Qwen2(config.decoder, rngs=rngs, param_dtype=param_dtype)

  def encode(self, frames: UInt8[Array, "C F height width 3"]) -> Float[Array, "C V D"]:
    """Clips (or image tiles, F = 1) to visual tokens in the decoder's width."""
    return self.connector(self.encode_patches(frames))

  def encode_patches(self, frames: UInt8[Array, "C F height width 3"]) -> Float[Array, "C P E"]:
    """Clips to the encoder's features, before merging."""
    dtype = self.vision.patch_embed.kernel.dtype
    return self.vision(normalise_pixels(frames).astype(dtype))

  def embed_sequence(
    self,
    token_ids: Int[Array, "B T"],
    visual_tokens: Float[Array, "B V D"],
    visual_index: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """The decoder's input: embedded text with the visual tokens in their places."""
    return splice(self.decoder.embed(token_ids), visual_tokens, visual_index)

  def __call__(
    self,
    token_ids: Int[Array, "B T"],
    visual_tokens: Float[Array, "B V D"],
    visual_index: Int[Array, "B T"],
    *,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Hidden states of a whole sequence, as in training; `decoder.logits` scores them.

    Args:
      token_ids: text, laid out with room for the visual tokens.
      visual_tokens: output of `encode` for all clips and tiles of a row, one after another.
      visual_index: which visual token stands at each position, or -1 for text.
      positions: rotary positions, 0, 1, 2... if None.
      segment_ids: tokens of packed rows see only their own segment.
    """
    sequence = self.embed_sequence(token_ids, visual_tokens, visual_index)
    return self.decoder(sequence, positions=positions, segment_ids=segment_ids)


def normalise_pixels(frames: UInt8[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
  """Bytes to what the encoders were trained on: (x / 255 - mean) / std per channel."""
  mean, std = jnp.asarray(PIXEL_MEAN), jnp.asarray(PIXEL_STD)
  return (frames.astype(jnp.float32) * (1 / 255) - mean) / std
