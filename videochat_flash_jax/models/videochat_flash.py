"""The paper's figure as code: encode clips, compress them, splice them into the text, decode."""

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import PIXEL_MEAN, PIXEL_STD, VideoChatFlashConfig
from videochat_flash_jax.models.connector import Connector
from videochat_flash_jax.models.internvideo2 import InternVideo2
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.splice import splice
from videochat_flash_jax.models.token_dropout import DropoutPlan
from videochat_flash_jax.models.umt import UMT
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int, UInt8

_MAX_PATCHES_PER_GROUP = 1 << 15  # clips are encoded in groups, since more take more memory

_ENCODERS = {"umt": UMT, "internvideo2": InternVideo2}


class VideoChatFlash(nnx.Module):
  """Video ViT, connector and decoder.

  Computation is in the dtype of the weights. Norms, softmax, rotary positions, token similarity and
  logits are always in float32.
  """

  def __init__(self, config: VideoChatFlashConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    if config.vision.kind not in _ENCODERS:
      raise InputError(
        f"vision encoder '{config.vision.kind}' of {config.name} is unknown; "
        f"known: {', '.join(_ENCODERS)}"
      )
    if config.dropout is not None:
      config.dropout.check(config.decoder.depth)
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
    """Encodes clips (or image tiles, F = 1) to visual tokens in the decoder's width."""
    return self.connector(self.encode_patches(frames))

  def encode_rows(
    self,
    frames: UInt8[Array, "B C F height width 3"],
    layout: Layout = ONE_DEVICE,
    tiles: UInt8[Array, "B I 1 height width 3"] | None = None,
  ) -> Float[Array, "B V D"]:
    """Encodes the clips and the image tiles of every row of a batch to visual tokens.

    A row's tokens are those of its clips, in order, then those of its tiles. On a mesh the clips
    are split over all devices. The clips of a row are split evenly over the shards of its sequence,
    the first clips on the first shard; its tiles, too. Each shard then holds the tokens of its own
    clips, then those of its own tiles:

        row of clips a b c d and tiles p q, 1 shard     tokens  a b c d p q
        the same row, 2 shards                          tokens  a b p | c d q

    Args:
      frames: clips of each row.
      layout: how rows and clips are split over a mesh.
      tiles: image tiles of each row.
    """

    def encode(parts, frames):
      """Visual tokens of one group of clips or tiles."""
      return parts["connector"](_encode_patches(parts["vision"], frames, layout))

    parts = {"vision": self.vision, "connector": self.connector}
    return self._row_tokens(encode, parts, layout, frames, tiles)

  def encode_features(
    self, frames: UInt8[Array, "B C F height width 3"], layout: Layout = ONE_DEVICE
  ) -> Float[Array, "B C V E"]:
    """Encodes clips to the features that a feature store keeps: merged, in the encoder's width."""

    def encode(parts, frames):
      """Merged features of one group of clips."""
      return parts["connector"].merge(_encode_patches(parts["vision"], frames, layout))

    parts = {"vision": self.vision, "connector": self.connector}
    features = self._each_clip(encode, parts, layout, frames)
    return features.reshape(*frames.shape[:2], -1, features.shape[-1])

  def project_rows(
    self,
    features: Float[Array, "B C V E"],
    layout: Layout = ONE_DEVICE,
    tile_features: Float[Array, "B I V E"] | None = None,
  ) -> Float[Array, "B W D"]:
    """As `encode_rows`, from the features of clips and tiles that `encode_features` gave before."""

    def project(parts, features):
      """Visual tokens of one group of clips or tiles."""
      return parts["connector"].project(features.astype(parts["connector"].fc1.kernel.dtype))

    parts = {"connector": self.connector}
    return self._row_tokens(project, parts, layout, features, tile_features)

  def _row_tokens(self, function, parts, layout, clips, tiles):
    """The tokens [B, V, D] that `function` makes of the clips of each row, then of its tiles."""
    tokens = ("batch", "sequence")
    of_clips = layout.constrain(self._each_clip(function, parts, layout, clips), *tokens)
    if tiles is None:
      return of_clips
    of_tiles = layout.constrain(self._each_clip(function, parts, layout, tiles), *tokens)

    def join(*kinds):
      """One shard's tokens of clips, then those of tiles."""
      return jnp.concatenate(kinds, axis=1)

    return layout.shard_map(join, (tokens, tokens), tokens)(of_clips, of_tiles)

  def _each_clip(self, function, parts, layout, clips):
    """The tokens [B, V, D] of clips [B, C, ...], by `function(parts, group)` of each group."""
    graph, weights = nnx.split(parts)
    weights = nnx.to_pure_dict(weights)
    dtypes = jax.tree.map(layout.products_in, weights)

    def run(weights, clips):
      """All groups of the clips on one device."""
      weights = layout.gather_shards(weights)

      def run_group(group):
        """One group; the gradients of all groups are summed in the dtype that `weights` have."""
        parts = nnx.merge(graph, jax.tree.map(lambda x, dtype: x.astype(dtype), weights, dtypes))
        return function(parts, group)

      rows, num_clips = clips.shape[:2]
      group = self._group_size(rows * num_clips)
      if group == rows * num_clips:
        output = run_group(clips.reshape(group, *clips.shape[2:]))
      else:
        groups = clips.reshape(-1, group, *clips.shape[2:])
        output = jax.lax.map(jax.checkpoint(run_group), groups)
      return output.reshape(rows, -1, output.shape[-1])

    split = layout.shard_map(run, (weights, ("batch", "clips")), ("batch", "clips"))
    return split(weights, clips)

  def _group_size(self, num_clips):
    """The most clips per group such that all groups have equally many and not too many patches."""
    vision = self.config.vision
    most = max(1, _MAX_PATCHES_PER_GROUP // vision.num_patches(vision.clip_frames))
    return max(group for group in range(1, most + 1) if num_clips % group == 0)

  def encode_patches(
    self, frames: UInt8[Array, "C F height width 3"], layout: Layout = ONE_DEVICE
  ) -> Float[Array, "C P E"]:
    """Encodes clips to one feature per patch, before merging."""
    return _encode_patches(self.vision, frames, layout)

  def embed_sequence(
    self,
    token_ids: Int[Array, "B T"],
    visual_tokens: Float[Array, "B V D"],
    visual_index: Int[Array, "B T"],
    layout: Layout = ONE_DEVICE,
  ) -> Float[Array, "B T D"]:
    """Embeds the text and puts the visual tokens at their positions in it: the decoder's input.

    On a mesh a shard of the sequence takes visual tokens of its own clips and tiles alone (see
    `encode_rows`), and `visual_index` is an index into those.
    """
    # No gradient goes to token 0 from all the slots whose embedding is not used.
    text = self.decoder.embed(jnp.where(visual_index < 0, token_ids, -1), layout)
    tokens = ("batch", "sequence")
    return layout.shard_map(splice, (tokens,) * 3, tokens)(text, visual_tokens, visual_index)

  def __call__(
    self,
    token_ids: Int[Array, "B T"],
    visual_tokens: Float[Array, "B V D"],
    visual_index: Int[Array, "B T"],
    *,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    layout: Layout = ONE_DEVICE,
  ) -> Float[Array, "B T D"]:
    """Hidden states of whole sequences, as in training. `decoder.logits` maps them to logits.

    Args:
      token_ids: text, with room for the visual tokens.
      visual_tokens: visual tokens of each row, from `encode_rows`.
      visual_index: index of the visual token at each position; -1 for text.
      positions: rotary positions; 0, 1, 2... if None.
      segment_ids: segments of packed rows. A token attends to its own segment only.
      layout: how arrays and weights are split over a mesh.
    """
    sequence = self.embed_sequence(token_ids, visual_tokens, visual_index, layout)
    return self.decoder(sequence, positions=positions, segment_ids=segment_ids, layout=layout)

  def read_and_drop(
    self,
    token_ids: Int[Array, "B T"],
    visual_tokens: Float[Array, "B V D"],
    visual_index: Int[Array, "B T"],
    plan: DropoutPlan,
    layout: Layout = ONE_DEVICE,
    positions: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """As `__call__`, but drops visual tokens between layers (see `models/token_dropout.py`).

    Args:
      token_ids: text, with room for the visual tokens.
      visual_tokens: visual tokens of each row, from `encode_rows`.
      visual_index: index of the visual token at each position; -1 for text.
      plan: from `plan_dropout`. It also holds the segments.
      layout: how arrays and weights are split over a mesh.
      positions: rotary positions before any drop; None: they are counted from 0 in each segment.

    Returns:
      Hidden states of the kept tokens; and their indices in the row, T in the padding.
    """
    sequence = self.embed_sequence(token_ids, visual_tokens, visual_index, layout)
    if positions is not None:
      positions = layout.from_zigzag(positions)
    return self.decoder.read_and_drop(sequence, plan, layout, positions)


def _encode_patches(vision, frames, layout):
  pixels = normalise_pixels(frames)
  return vision(pixels.astype(layout.products_in(vision.patch_embed.kernel)))


def normalise_pixels(frames: UInt8[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
  """Normalises bytes as the encoders were trained: (x / 255 - mean) / std per channel."""
  mean, std = jnp.asarray(PIXEL_MEAN), jnp.asarray(PIXEL_STD)
  return (frames.astype(jnp.float32) * (1 / 255) - mean) / std
