"""Settings of training batches, checked before anything is read."""

import dataclasses

from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.text.conversation import TEMPLATES
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import Rule, choice, count, field, is_integer, is_pair, optional
from videochat_flash_jax.models.config import TilingConfig

SAMPLINGS = ("dynamic_fps1", "middle")


def _are_frames(value):
  usable = is_pair(value) and all(is_integer(number) and number > 0 for number in value)
  return usable and value[0] <= value[1] and not any(number % CLIP_FRAMES for number in value)


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
  """How an annotation row is read: the settings that a user chooses."""

  frames: tuple[int, int] = field(
    (64, 512),
    Rule(_are_frames, "the least and the most frames, multiples of 4, such as (64, 512)"),
    "The least and the most frames of a video; `middle` takes the most.",
    convert=tuple,
  )
  sampling: str = field(
    "dynamic_fps1",
    choice(*SAMPLINGS),
    "Which frames of a video are read: one a second within `frames`, or the middle of equal parts.",
  )
  template: str = field("qwen_2", choice(*TEMPLATES), "The template of conversations.")
  time_message: str | None = field(
    "short",
    optional(choice("short", "long", "")),
    "The sentence about a video's length and frames; '' for none.",
  )
  label_style: str = field(
    "qwen",
    choice("qwen", "clean"),
    "Which tokens are learnt: qwen, the answers and the headers of turns; clean, the answers only.",
  )
  position_skip: int = field(
    0,
    count(0),
    "Rotary positions of an example jump ahead twice, by up to this many, so that larger ones are "
    "learnt than rows are long.",
  )


@dataclasses.dataclass(frozen=True)
class ExampleConfig(ReadingConfig):
  """How an annotation row becomes an example.

  Attributes:
    image_size: side of a frame and of an image tile, in pixels.
    tiling: how an image is cut into tiles if it is the only one in its conversation.
    time_message: as in `ReadingConfig`; "" becomes None.
  """

  image_size: int = dataclasses.field(kw_only=True)
  tiling: TilingConfig = dataclasses.field(default_factory=TilingConfig, kw_only=True)

  def __post_init__(self):
    for each in dataclasses.fields(ReadingConfig):
      value, rule = getattr(self, each.name), each.metadata["rule"]
      if not rule.accepts(value):
        raise InputError(f"{each.name} is {value!r:.80}; give {rule.remedy}")
    # A config of a run has "" for none; here and in saved states it is None.
    object.__setattr__(self, "time_message", self.time_message or None)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How examples are drawn, packed and read.

  Attributes:
    example: how an annotation row becomes an example.
    row_shape: shape of a packed row, and how the mesh splits it.
    rows: B, the rows of a batch, counted over all processes.
    seed: seed of the order of examples.
    streams: number of independent packers. Each one fills `rows / streams` rows of a batch. Batches
      depend on this number, but not on how many processes share the streams.
    workers: number of processes that read ahead, for each stream; 0 reads each batch only when it
      is asked for. Batches do not depend on this number.
    max_broken_share: the run stops when a larger share of the examples could not be read.
  """

  example: ExampleConfig
  row_shape: RowShape
  rows: int
  seed: int
  streams: int = 1
  workers: int = 0
  max_broken_share: float = 0.01

  def __post_init__(self):
    if self.streams < 1 or self.rows < 1 or self.rows % self.streams:
      raise InputError(
        f"rows is {self.rows} and streams {self.streams}; give rows that are a multiple of streams"
      )
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed is {self.seed}; give a number from 0 to 2**32 - 1")

  def facts(self) -> dict:
    """Returns all settings that decide the content of a batch, as one flat dict of JSON values."""
    facts = dataclasses.asdict(self)
    del facts["workers"], facts["max_broken_share"]  # they do not decide it
    for part in ("example", "row_shape"):
      facts |= facts.pop(part)
    del facts["tile_tokens"]  # follows from the other sizes, and earlier versions did not save it
    tiling, frames = facts.pop("tiling"), facts.pop("frames")
    return facts | tiling | {"frames": list(frames)}
