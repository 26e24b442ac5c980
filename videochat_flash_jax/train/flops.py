"""The operations of a training step, counted by hand, for the model FLOPs utilisation.

A product of x [n, a] and a weight [a, b] takes 2 n a b operations. If the weight is trained, its
gradient takes as many; if anything before it is trained, the gradient of x does, too. What the
backward pass computes a second time (`remat`) is not counted, nor is anything but products of
matrices.
"""

from videochat_flash_jax.models.config import DecoderConfig, VideoChatFlashConfig
from videochat_flash_jax.train.optimizer import scale_of
from videochat_flash_jax.train.settings import TrainSettings


def step_flops(settings: TrainSettings, sequence_shards: int) -> float:
  """Operations of a step on all chips together, also those on padding.

  Attention is counted as if each row were one conversation, so with packed rows the count is higher
  than what is computed. Dropped tokens and adapters (less than a hundredth at rank 16) are ignored.
  Where features are stored, the encoder computes nothing.

  Args:
    settings: of the run.
    sequence_shards: parts into which each row is split (`Layout.sequence_shards`).
  """
  model, rows, trained = settings.model, settings.rows, _trained_parts(settings)
  clips = rows * sequence_shards * settings.clips_per_shard
  tiles = rows * sequence_shards * settings.tiles_per_shard
  encoder = 0.0
  if not settings.data.features:
    encoder += clips * encoder_flops(settings, model.vision.clip_frames)
    encoder += tiles * encoder_flops(settings, num_frames=1)
  visual_tokens = clips * model.clip_tokens + tiles * model.tile_tokens
  connector = visual_tokens * _connector(model, trained)
  return encoder + connector + rows * _decoder(model.decoder, settings.tokens_per_row, trained)


def _trained_parts(settings: TrainSettings) -> set[str]:
  """Parts whose own weights are trained, and `into_...` those whose inputs need a gradient."""

  def is_trained(path):
    """Whether the optimiser changes the weight of a dotted path."""
    return scale_of(settings.optimizer, path) > 0

  parts = {
    "vision": is_trained("vision.blocks.stacked.fc1.kernel"),
    "connector": is_trained("connector.fc1.kernel"),
    "decoder": is_trained("decoder.layers.stacked.up_proj.kernel"),
    "head": is_trained("decoder.lm_head.kernel"),
    "into_connector": is_trained("vision.blocks.stacked.fc1.kernel"),
  }
  if settings.model.decoder.tied_embeddings:
    parts["head"] = is_trained("decoder.embed_tokens.embedding")
  is_input_trained = parts["vision"] or parts["connector"]
  parts["into_decoder"] = is_input_trained or parts["decoder"] or settings.lora.rank > 0
  return {name for name, is_true in parts.items() if is_true}


def _num_products(trained, part):
  """How many products are made with a weight of a part: forward, and for each gradient."""
  into = {"vision": "vision", "head": "into_decoder"}.get(part, f"into_{part}")
  return 1 + (part in trained) + (into in trained)


def encoder_flops(settings: TrainSettings, num_frames: int) -> float:
  """Operations of the encoder on one clip of so many frames, or on a tile, which has one."""
  vision = settings.model.vision
  patches = vision.num_patches(num_frames)
  layer = vision.width * (4 * vision.width + 2 * vision.mlp_width)
  weights = vision.depth * layer + 3 * vision.patch_size**2 * vision.width
  attention = vision.depth * 2 * patches * vision.width  # scores, and the weighted sum of values
  products = _num_products(_trained_parts(settings), "vision")
  return 2.0 * patches * (weights + attention) * products


def _connector(model: VideoChatFlashConfig, trained: set[str]) -> float:
  """Operations on one visual token."""
  weights = model.decoder.width * (model.vision.width + model.decoder.width)
  return 2.0 * weights * _num_products(trained, "connector")


def _decoder(decoder: DecoderConfig, num_tokens: int, trained: set[str]) -> float:
  """Operations on one row."""
  heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
  layer = decoder.width * (heads * decoder.head_size + 3 * decoder.mlp_width)
  # A token attends to half of the row on average.
  attention = 2 * num_tokens / 2 * decoder.num_heads * decoder.head_size
  head = decoder.width * decoder.vocab_size
  per_token = decoder.depth * layer * _num_products(trained, "decoder")
  per_token += decoder.depth * attention * (1 + 2 * ("into_decoder" in trained))
  per_token += head * _num_products(trained, "head")
  return 2.0 * num_tokens * per_token
