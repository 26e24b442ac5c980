"""The sizes and options of a model: frozen dataclasses, and a constructor per checkpoint."""

import dataclasses
import itertools

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import (
  REQUIRED,
  choice,
  count,
  field,
  is_integer,
  is_number,
  number,
  pattern,
  sequence,
)

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A video ViT: joint space-time attention over the patches of one clip.

  `depth` is the number of blocks that run. The original takes the output of its last but one block,
  so UMT-L (24 blocks) has depth 23 here. UMT has fixed sinusoid positions for `position_frames`
  frames of `position_grid` x `position_grid` patches, which are resampled to other sizes.
  InternVideo2 learns positions for `clip_frames` frames of `image_size`.
  """

  kind: str  # "umt" or "internvideo2"
  image_size: int  # pixels, height = width
  patch_size: int  # pixels
  width: int  # E
  depth: int
  num_heads: int  # N
  mlp_width: int  # M
  clip_frames: int = 4
  position_frames: int = 4
  position_grid: int = 14

  @property
  def grid_size(self) -> int:
    """Patches along one side of a frame."""
    return self.image_size // self.patch_size

  def num_patches(self, num_frames: int) -> int:
    """P, the patches of a clip of so many frames; an image tile has one frame."""
    return num_frames * self.grid_size**2


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """Clip-level HiCo: token merging (ToMe) to a fixed number of tokens, then an MLP."""

  clip_tokens: int = 64  # the most that a clip or an image tile is merged to; see `num_tokens`
  merge_heads: int = 16  # similarity is measured on features averaged over these heads

  def num_tokens(self, num_patches: int) -> int:
    """V, the visual tokens that a clip or an image tile of so many patches becomes.

    One with no more than `clip_tokens` patches keeps them all. A tile of `tiny` has 16 of at most
    24; one of 112 x 112 pixels has 49 of at most 64.
    """
    return min(self.clip_tokens, num_patches)


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN: rotary positions stretched to `factor` times `original_positions` (Peng et al. 2023)."""

  factor: float
  original_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A Qwen2 decoder.

  `max_positions` is the most tokens of a prompt and its answer together. A longer prompt raises an
  error; it is never cut.
  """

  vocab_size: int
  width: int  # D
  depth: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_size: int  # H
  mlp_width: int  # M
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  tied_embeddings: bool = False
  max_positions: int = 32768
  yarn: YarnConfig | None = None


# What the backward pass computes again; see `models.layer_stack.LayerStack`.
REMAT = ("full", "dots", "none")

DROPOUT_KINDS = ("uniform", "attention", "uniform0_attention", "uniform1_attention")


@dataclasses.dataclass(frozen=True)
class DropoutConfig:
  """Video-level HiCo: visual tokens are dropped between decoder layers.

  With `layers=(4, 18)` and `ratios=(1, 0.75, 0.25)`, layers 0 to 3 read all visual tokens of a row,
  layers 4 to 17 three quarters of them, and later layers one quarter. `kind` says how the kept
  tokens are chosen:

    uniform              evenly spaced tokens
    attention            the tokens that the question attends to most
    uniform0_attention   evenly spaced at the first of `layers`, by attention at the others
    uniform1_attention   evenly spaced at the first two of `layers`, by attention at the others
  """

  kind: str = field(REQUIRED, choice("", *DROPOUT_KINDS), "How the kept tokens are chosen.")
  layers: tuple[int, ...] = field(
    REQUIRED,
    sequence(is_integer, "a tuple of integers"),
    "Tokens are dropped before these layers, counted from 0.",
    convert=tuple,
  )
  ratios: tuple[float, ...] = field(
    REQUIRED,
    sequence(is_number, "a tuple of numbers"),
    "The share of the visual tokens that each segment of layers sees; the first is 1.",
    convert=tuple,
  )

  @classmethod
  def model_card(cls) -> "DropoutConfig":
    """The preset of the released model cards."""
    return cls("uniform0_attention", layers=(4, 18), ratios=(1.0, 0.75, 0.25))

  @property
  def num_uniform(self) -> int:
    """How many of the drops, counted from the first, keep evenly spaced tokens."""
    first = {"uniform": len(self.layers), "uniform0_attention": 1, "uniform1_attention": 2}
    return min(first.get(self.kind, 0), len(self.layers))

  def check(self, depth: int) -> None:
    """Checks the config against the number of layers of its decoder.

    Raises:
      InputError: names the first field that cannot be used, and what to give.
    """
    layers, ratios = self.layers, self.ratios
    is_known = isinstance(self.kind, str) and self.kind in DROPOUT_KINDS
    _require(is_known, "kind", self.kind, f"one of {', '.join(DROPOUT_KINDS)}")
    usable = isinstance(layers, tuple) and len(layers) > 0 and all(type(n) is int for n in layers)
    usable = usable and min(layers) > 0 and max(layers) < depth and _rises(layers)
    _require(usable, "layers", layers, f"a tuple of rising layers from 1 to {depth - 1}")
    usable = isinstance(ratios, tuple) and len(ratios) == len(layers) + 1
    usable = usable and all(type(ratio) in (int, float) for ratio in ratios)
    usable = usable and ratios[0] == 1 and all(0 < ratio <= 1 for ratio in ratios)
    usable = usable and list(ratios) == sorted(ratios)[::-1]
    remedy = f"a tuple of {len(layers) + 1} numbers above 0 that start with 1 and never rise"
    _require(usable, "ratios", ratios, remedy)


def _rises(numbers):
  return list(numbers) == sorted(set(numbers))


def _require(usable, name, value, remedy):
  if not usable:
    raise InputError(f"dropout.{name} is {value!r:.80}: give {remedy}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters of linear layers (Hu et al. 2021): y = W x + B A x * alpha / rank."""

  rank: int = field(0, count(0), "The width of the adapters; 0 means that there are none.")
  alpha: float = field(
    16.0, number(above=0), "The output of the adapters is scaled by alpha / rank."
  )
  targets: str = field(
    r"decoder\..*\.(q|k|v|o)_proj",
    pattern(),
    "A regular expression that is searched in the paths of linear layers.",
  )


@dataclasses.dataclass(frozen=True)
class TilingConfig:
  """How a single image is cut: at most `max_columns` x `max_rows` square tiles, and a base view."""

  max_columns: int = 6
  max_rows: int = 6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How many frames T are read from a video at inference: one per second, within bounds.

  T = max(min_frames, min(local_frames * floor(seconds / local_frames), max_frames)).
  """

  min_frames: int = 64
  max_frames: int = 512
  local_frames: int = 8


@dataclasses.dataclass(frozen=True)
class VideoChatFlashConfig:
  """A whole model: encoder, connector, decoder, and how videos and images are cut.

  `dropout` is off (None) in all released configs.
  """

  name: str
  vision: VisionConfig
  connector: ConnectorConfig
  decoder: DecoderConfig
  sampling: SamplingConfig = SamplingConfig()
  tiling: TilingConfig = TilingConfig()
  dropout: DropoutConfig | None = None

  @property
  def clip_tokens(self) -> int:
    """V of a clip. Whatever counts visual tokens asks for this number, or for `tile_tokens`."""
    return self.connector.num_tokens(self.vision.num_patches(self.vision.clip_frames))

  @property
  def tile_tokens(self) -> int:
    """V of an image tile, which has one frame: on small tiles fewer than `clip_tokens`."""
    return self.connector.num_tokens(self.vision.num_patches(1))

  @property
  def layer_parts(self) -> list[range]:
    """The layers of the decoder, in parts between which visual tokens are dropped."""
    edges = [0, *(self.dropout.layers if self.dropout else ()), self.decoder.depth]
    return [range(*edge) for edge in itertools.pairwise(edges)]

  @property
  def num_shared_parts(self) -> int:
    """How many of the parts, from the first, come before any drop that ranks by attention."""
    return 1 + (self.dropout.num_uniform if self.dropout else 0)

  @classmethod
  def tiny(cls) -> "VideoChatFlashConfig":
    """The small model that ships with the package. It was trained on the synthetic world."""
    return cls(
      name="tiny",
      vision=VisionConfig(
        kind="umt",
        image_size=32,
        patch_size=8,
        width=96,
        depth=3,
        num_heads=4,
        mlp_width=288,
        position_grid=4,
      ),
      connector=ConnectorConfig(clip_tokens=24, merge_heads=4),
      decoder=DecoderConfig(
        vocab_size=768,
        width=128,
        depth=4,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        mlp_width=320,
        tied_embeddings=True,
      ),
      sampling=SamplingConfig(min_frames=4, max_frames=512, local_frames=4),
    )

  @classmethod
  def qwen2_7b_res224(cls) -> "VideoChatFlashConfig":
    """OpenGVLab/VideoChat-Flash-Qwen2-7B_res224."""
    return cls("VideoChat-Flash-Qwen2-7B_res224", _umt_l(224), ConnectorConfig(), _qwen2_7b())

  @classmethod
  def qwen2_7b_res448(cls) -> "VideoChatFlashConfig":
    """OpenGVLab/VideoChat-Flash-Qwen2-7B_res448, the overall best."""
    return cls("VideoChat-Flash-Qwen2-7B_res448", _umt_l(448), ConnectorConfig(), _qwen2_7b())

  @classmethod
  def qwen2_5_2b_res448(cls) -> "VideoChatFlashConfig":
    """OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448 (Qwen2.5-1.5B with an untied head)."""
    decoder = DecoderConfig(
      vocab_size=151936,
      width=1536,
      depth=28,
      num_heads=12,
      num_kv_heads=2,
      head_size=128,
      mlp_width=8960,
    )
    return cls("VideoChat-Flash-Qwen2_5-2B_res448", _umt_l(448), ConnectorConfig(), decoder)

  @classmethod
  def qwen2_5_7b_1m_res224(cls) -> "VideoChatFlashConfig":
    """OpenGVLab/VideoChat-Flash-Qwen2_5-7B-1M_res224, with a million positions."""
    decoder = dataclasses.replace(
      _qwen2_7b(), rope_theta=1e7, norm_eps=1e-5, max_positions=1_010_000
    )
    return cls("VideoChat-Flash-Qwen2_5-7B-1M_res224", _umt_l(224), ConnectorConfig(), decoder)

  @classmethod
  def qwen2_5_7b_internvideo2_1b(cls) -> "VideoChatFlashConfig":
    """OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B."""
    vision = VisionConfig(
      kind="internvideo2",
      image_size=224,
      patch_size=14,
      width=1408,
      depth=39,
      num_heads=16,
      mlp_width=6144,
    )
    name = "VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B"
    return cls(name, vision, ConnectorConfig(), _qwen2_7b())


def released_configs() -> list[VideoChatFlashConfig]:
  """The configs of all released models."""
  return [
    VideoChatFlashConfig.qwen2_7b_res224(),
    VideoChatFlashConfig.qwen2_7b_res448(),
    VideoChatFlashConfig.qwen2_5_2b_res448(),
    VideoChatFlashConfig.qwen2_5_7b_1m_res224(),
    VideoChatFlashConfig.qwen2_5_7b_internvideo2_1b(),
  ]


def _umt_l(image_size: int) -> VisionConfig:
  return VisionConfig(
    kind="umt",
    image_size=image_size,
    patch_size=16,
    width=1024,
    depth=23,
    num_heads=16,
    mlp_width=4096,
  )


def _qwen2_7b() -> DecoderConfig:
  return DecoderConfig(
    vocab_size=152064,
    width=3584,
    depth=28,
    num_heads=28,
    num_kv_heads=4,
    head_size=128,
    mlp_width=18944,
  )
