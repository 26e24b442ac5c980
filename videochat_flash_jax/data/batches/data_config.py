"""What batches of training data are made of, checked before anything is read."""

import dataclasses

from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.text.conversation import TEMPLATES
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import TilingConfig

_WORDS = {
  "sampling": ("dynamic_fps1", "middle"),
  "template": TEMPLATES,
  "time_message": ("short", "long", None),
  "label_style": ("qwen", "clean"),
}


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
  """How a row of annotations becomes an example.

  Attributes:
    image_size: side of a frame, and of an image tile, in pixels.
    frames: the least and the most of a video, multiples of 4; `middle` takes the most.
    sampling: `dynamic_fps1`, one frame a second within `frames`, or `middle`.
    template: of conversations, out of `conversation.TEMPLATES`.
    time_message: what is said of a video's length: "short", "long" or None.
    label_style: "qwen" or "clean"; see `conversation.encode_dialog`.
    tiling: of an image that is alone in its conversation.
    position_skip: positions of an example jump by up to so many, twice; see `skipped_positions`.
  """

  image_size: int
  frames: tuple[int, int] = (64, 512)
  sampling: str = "dynamic_fps1"
  template: str = "qwen_2"
  time_message: str | None = "short"
  label_style: str = "qwen"
  tiling: TilingConfig = dataclasses.field(default_factory=TilingConfig)
  position_skip: int = 0

  def __post_init__(self):
    for field, words in _WORDS.items():
      if getattr(self, field) not in words:
        known = ", ".join(map(str, words))
        raise InputError(f"{field} is {getattr(self, field)!r}; use one of {known}")
    least, most = self.frames
    if not 0 < least <= most or least % CLIP_FRAMES or most % CLIP_FRAMES:
      raise InputError(
        f"frames is {self.frames}; give the least and the most, multiples of {CLIP_FRAMES}"
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How examples are drawn, packed and read.

  Attributes:
    example: how a row becomes an example.
    layout: of a packed row on the mesh.
    rows: B of a batch, of all processes together.
    seed: of the order of examples.
    streams: independent packers; each fills `rows / streams` rows of a batch. Batches depend on
      their number, and not on how many processes share them.
    workers: processes that read ahead, for each stream; 0 reads when asked. Batches do not depend
      on their number.
    max_broken_share: the run stops when more of the examples could not be read.
  """

  example: ExampleConfig
  layout: RowShape
  rows: int
  seed: int
  streams: int = 1
  workers: int = 0
  max_broken_share: float = 0.01

  def __post_init__(self):
    if self.streams < 1 or self.rows < 1 or self.rows % self.streams:
      raise InputError(f"rows is {self.rows} and streams {self.streams}; give a multiple of them")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed is {self.seed}; give a number from 0 to 2**32 - 1")

  def facts(self) -> dict:
    """All that decides what is in a batch, flat and fit for JSON."""
    facts = dataclasses.asdict(self)
    for field in ("workers", "max_broken_share"):
      del facts[field]
    for part in ("example", "layout"):
      facts |= facts.pop(part)
    tiling, frames = facts.pop("tiling"), facts.pop("frames")
    return facts | tiling | {"frames": list(frames)}
