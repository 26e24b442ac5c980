"""What a conversation has seen: videos and images, as its prompt and its user are told of them."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.media.frame_sampling import interval_indices
from videochat_flash_jax.data.media.frame_source import FrameSource
from videochat_flash_jax.data.text.conversation import image_opening, video_opening
from videochat_flash_jax.inference.watching import Window
from videochat_flash_jax.shapes import UInt8


class Frame(NamedTuple):
  """A frame that was watched.

  Attributes:
    seconds: when it is shown.
    picture: a square, as the model sees it.
  """

  seconds: float
  picture: UInt8[np.ndarray, "S S 3"]


@dataclasses.dataclass
class Video:
  """A video.

  Attributes:
    name: to be shown.
    clip_frames: frames of a clip.
    window: how much of it is remembered; None for all.
    num_forgotten: visual tokens that were forgotten.
    seconds: its duration, or that of the part that was watched.
    watch_seconds: wall time of decoding, encoding and reading it.
    times: the second at which each frame that was watched is shown.
    sources: where these frames are, and how many are from each source; one, and one more for each
      `extend`.
  """

  name: str
  clip_frames: int
  window: Window | None = None
  num_forgotten: int = 0
  seconds: float = 0.0
  watch_seconds: float = 0.0
  times: list[float] = dataclasses.field(default_factory=list)
  sources: list[tuple[FrameSource, int]] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    """How long it is, how many different frames are remembered, and how far they are apart."""
    times = np.unique(self.frame_times)
    text = f"{self.name}: {self.seconds:.1f} s, {len(times)} frame{'s' * (len(times) > 1)}"
    if len(times) > 1:
      text += f", one every {np.diff(times).mean():.2g} s"
    if dropped := len(self.times) - len(self.remembered):
      text += f", {dropped} more were dropped"
    return text

  @property
  def opening(self) -> str:
    """What the prompt says of it."""
    return video_opening(len(self.remembered), self.seconds)

  @property
  def remembered(self) -> np.ndarray:
    """Indices of the frames that are remembered, among those that were watched."""
    if self.window is None:
      return np.arange(len(self.times))
    return self.window.remembered(len(self.times), self.clip_frames, self.num_forgotten)

  @property
  def frame_times(self) -> list[float]:
    """The second at which each remembered frame is shown."""
    return [self.times[index] for index in self.remembered]

  def add(self, source: FrameSource, num_frames: int) -> None:
    """Adds the first frames of a source, which were watched."""
    start, is_whole = self.seconds, num_frames == len(source.times)
    self.times += [start + time for time in source.times[:num_frames]]
    self.seconds += source.seconds if is_whole else source.times[num_frames]
    self.sources.append((source if source.path else FrameSource(), num_frames))

  def frames(self, num_frames: int | None, image_size: int) -> Iterator[Frame]:
    """Reads remembered frames again, evenly spaced ones if there are more than `num_frames`.

    Raises:
      InputError: they were no files, or cannot be read any more.
    """
    wanted = self.remembered
    if num_frames is not None:
      wanted = wanted[interval_indices(len(wanted), min(num_frames, len(wanted)))]
    first = 0
    for source, count in self.sources:
      here = wanted[(wanted >= first) & (wanted < first + count)]
      pictures = source.look_again(here - first, image_size) if len(here) else ()
      for index, picture in zip(here, pictures, strict=True):
        yield Frame(self.times[index], picture)
      first += count


@dataclasses.dataclass
class Images:
  """Images.

  Attributes:
    num_images: number of images.
    num_tiles: number of encoded tiles; a base view is one of them.
  """

  num_images: int
  num_tiles: int

  def __str__(self) -> str:
    return f"{self.num_images} image{'s' * (self.num_images > 1)} in {self.num_tiles} tiles"

  @property
  def opening(self) -> str:
    """What the prompt says of them."""
    return image_opening(self.num_images)
