"""The work of a training step, counted by hand: what its share of the chips' peak is taken of.

A product of x [n, a] and a weight [a, b] takes 2 n a b operations. If the weight learns, so does
its gradient; and if anything below it learns, so does that of x. What the backward pass computes
again (`remat`), and all that is no product of matrices, is not counted.
"""

from collections.abc import Callable

from videochat_flash_jax.models.config import DecoderConfig, VideoChatFlashConfig, VisionConfig
from videochat_flash_jax.train.optimizer import scale_of
from videochat_flash_jax.train.settings import TrainSettings


def step_flops(settings: TrainSettings, sequence_shards: int) -> float:
  """Operations of a step on all chips together, places without a token or a picture among them.

  Attention is counted as if each row were one conversation, so with packed rows it is more than is
  computed. Dropped tokens and adapters (less than a hundredth at rank 16) are not looked at. Where
  features are stored, the encoder computes nothing.

  Args:
    settings: of the run.
    sequence_shards: parts of a row (`Layout.sequence_shards`).
  """
  model, rows = settings.model, settings.rows

  def learns(path):
    return scale_of(settings.optimizer, path) > 0

  learning = _parts_that_learn(settings, learns)
  if settings.objective == "patches":
    clips = rows * settings.clips_per_shard
    return clips * _encoder(model.vision, model.vision.clip_frames, learning)
  clips = rows * sequence_shards * settings.clips_per_shard
  tiles = rows * sequence_shards * settings.tiles_per_shard
  encoder = 0.0
  if not settings.data.features:
    encoder += clips * _encoder(model.vision, model.vision.clip_frames, learning)
    encoder += tiles * _encoder(model.vision, 1, learning)
  connector = (clips + tiles) * _connector(model, learning)
  return encoder + connector + rows * _decoder(model.decoder, settings.tokens_per_row, learning)


def _parts_that_learn(settings: TrainSettings, learns: Callable[[str], bool]) -> set[str]:
  """Parts whose own weights learn, and `into_...` those whose inputs need a gradient."""
  parts = {
    "vision": learns("vision.blocks.stacked.fc1.kernel"),
    "connector": learns("connector.fc1.kernel"),
    "decoder": learns("decoder.layers.stacked.up_proj.kernel"),
    "head": learns("decoder.lm_head.kernel"),
    "into_connector": learns("vision.blocks.stacked.fc1.kernel"),
  }
  if settings.model.decoder.tied_embeddings:
    parts["head"] = learns("decoder.embed_tokens.embedding")
  below = parts["vision"] or parts["connector"]
  parts["into_decoder"] = below or parts["decoder"] or settings.lora.rank > 0
  return {name for name, is_true in parts.items() if is_true}


def _times(learning, part):
  """How often a product with a weight of a part is made: forwards, and for the gradients."""
  into = {"vision": "vision", "head": "into_decoder"}.get(part, f"into_{part}")
  return 1 + (part in learning) + (into in learning)


def _encoder(vision: VisionConfig, num_frames: int, learning: set[str]) -> float:
  """Of one clip or tile."""
  patches = num_frames * vision.grid_size**2
  layer = vision.width * (4 * vision.width + 2 * vision.mlp_width)
  weights = vision.depth * layer + 3 * vision.patch_size**2 * vision.width
  attention = vision.depth * 2 * patches * vision.width  # scores, and values by them
  return 2.0 * patches * (weights + attention) * _times(learning, "vision")


def _connector(model: VideoChatFlashConfig, learning: set[str]) -> float:
  """Of one clip or tile."""
  weights = model.decoder.width * (model.vision.width + model.decoder.width)
  return 2.0 * model.connector.clip_tokens * weights * _times(learning, "connector")


def _decoder(decoder: DecoderConfig, num_tokens: int, learning: set[str]) -> float:
  """Of one row."""
  heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
  layer = decoder.width * (heads * decoder.head_size + 3 * decoder.mlp_width)
  attention = 2 * num_tokens / 2 * decoder.num_heads * decoder.head_size  # sees what is before it
  head = decoder.width * decoder.vocab_size
  per_token = decoder.depth * layer * _times(learning, "decoder")
  per_token += decoder.depth * attention * (1 + 2 * ("into_decoder" in learning))
  per_token += head * _times(learning, "head")
  return 2.0 * num_tokens * per_token
