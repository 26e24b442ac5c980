"""Opens whatever a user wants to have watched: a video, pictures, or an iterator of frames."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from videochat_flash_jax.data.media.files import local_path
from videochat_flash_jax.data.media.frame_choice import (
  FrameChoice,
  VideoPart,
  frames_at,
  part_between,
  sampled_frames,
)
from videochat_flash_jax.data.media.frame_sampling import limited_indices
from videochat_flash_jax.data.media.frame_source import (
  FrameSource,
  IteratorSource,
  PictureSource,
  QueueFrames,
  VideoSource,
  file_name,
  is_array,
)
from videochat_flash_jax.data.media.image_reader import ImageSource, is_picture
from videochat_flash_jax.data.media.picture_folder import list_pictures
from videochat_flash_jax.data.media.video_reader import VideoInfo, open_video
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import argument, count, is_sequence, number, optional
from videochat_flash_jax.models.config import SamplingConfig

Watchable = str | Path | np.ndarray | Sequence[ImageSource] | Iterable[ImageSource] | Queue

_FRAMES = "give uint8 [frames, height, width, 3]"


def open_source(
  source: Watchable,
  *,
  sampling: SamplingConfig,
  start: float | None = None,
  end: float | None = None,
  fps: float | None = None,
  times: Sequence[float] | np.ndarray | None = None,
  max_frames: int | None = None,
  stall_seconds: float | None = None,
  known_info: Callable[[str | Path], VideoInfo | None] | None = None,
) -> FrameSource:
  """Opens what a user wants to have watched.

  | source                        | `fps`                            | `times`             |
  |-------------------------------|----------------------------------|---------------------|
  | a video: its path or address  | the most frames a second watched | of those to watch   |
  | a folder of numbered pictures | pictures a second                | of each picture     |
  | an array, a list of pictures  | frames a second                  | of each frame       |
  | an iterator, a queue          | frames a second                  | cannot be given     |

  A video without `fps` and `times` is sampled as `inference_indices` says; so is a folder, with one
  picture a second. Otherwise pictures are watched as they are, at 1 fps by default, or evenly
  spaced ones if there are more than `max_frames`. The last frame is repeated to fill its clip of
  four.

  With a video of 60 s, `start=10, fps=2, max_frames=64` gives 64 frames, evenly spaced from 10 s to
  60 s, as two a second would be 100.

  Args:
    source: see the table. Arrays are uint8 `[F, H, W, 3]`; lists, iterators and queues hold paths,
      Pillow images or arrays `[H, W, 3]`. The pictures of a list may have any sizes, the frames of
      an iterator have one. A queue ends with None.
    sampling: of the model.
    start: in seconds, by default the beginning. What is shown at this time is watched.
    end: in seconds; the end of the video by default, and if the video is shorter.
    fps: see the table; not together with `times`.
    times: in seconds, rising; see the table.
    max_frames: the most different frames to watch, rounded down to whole clips of four; fewer than
      four fill one clip by repeats. An iterator is left after that many, since nobody knows how
      many will come. By default the model's bound.
    stall_seconds: the longest time to wait for a frame of an iterator; by default forever.
    known_info: see `VideoSource`.

  Raises:
    InputError: the source cannot be opened, or an argument does not fit.
  """
  start = argument("start", start, optional(number()))
  end = argument("end", end, optional(number(above=start or 0)))
  fps = argument("fps", fps, optional(number(above=0)))
  max_frames = argument("max_frames", max_frames, optional(count()))
  stall_seconds = argument("stall_seconds", stall_seconds, optional(number(above=0)))
  times = _check_times(times)
  if fps is not None and times is not None:
    raise InputError("fps and times are both given; give one of them")

  def pictures(pictures, name, path=None):
    """A source of pictures that are there."""
    shown = _shown(times, fps or 1.0, len(pictures), name)
    choice = _choose_pictures(*shown, start, end, max_frames or sampling.max_frames)
    return PictureSource(pictures, name, choice, path)

  def choose(info):
    """The frames of a video."""
    seconds = np.arange(info.num_frames) / info.fps
    part = VideoPart(*part_between(seconds, info.seconds, start, end), info.fps)
    if times is None:
      return sampled_frames(part, sampling, max_frames, fps)
    if len(times) > (max_frames or len(times)):
      raise InputError(
        f"times has {len(times)} entries and max_frames is {max_frames}; give fewer times, or a "
        "greater max_frames"
      )
    return frames_at(part, times)

  if isinstance(source, str | os.PathLike):
    path = local_path(source)
    if is_picture(path):
      raise InputError(
        f"{path}: a picture, not a video; look at it by chat.look (--image), or watch a list of "
        "pictures"
      )
    if os.path.isdir(path) and (fps is not None or times is not None):
      return pictures(list_pictures(Path(path)), file_name(path), path)
    return VideoSource(path, lambda: open_video(path), choose, known_info)
  if is_array(source):
    return pictures(_check_array(source), "frames")
  if is_sequence(source):
    return pictures(source, "pictures")
  if _is_queue(source):
    source = QueueFrames(source)
  if not isinstance(source, Iterable):
    raise InputError(
      f"an object of type {type(source).__name__} cannot be watched; give a path, an address, "
      "uint8 [frames, height, width, 3], a list of pictures, or an iterator or a queue of frames"
    )
  if times is not None:
    raise InputError("times cannot be given for an iterator; give fps, or a list of its frames")
  return IteratorSource(
    source,
    "frames",
    max_frames or sampling.max_frames,
    fps=fps or 1.0,
    start=start or 0.0,
    end=end,
    stall_seconds=stall_seconds,
    warns=max_frames is None,
  )


def _is_queue(source: Any) -> bool:
  """Whether it is a queue of threads or of processes; these have no common base class."""
  return hasattr(source, "get") and hasattr(source, "put")


def _check_times(times: Any) -> np.ndarray | None:
  """Returns times as float64 `[N]`."""
  if times is None:
    return None
  try:
    array = np.asarray(times)
  except ValueError:  # lists of different lengths
    array = np.asarray(None)
  is_usable = array.dtype.kind in "iuf" and array.ndim == 1 and array.size > 0
  array = array.astype(np.float64) if is_usable else array
  if not is_usable or not (np.isfinite(array) & (array >= 0)).all() or (np.diff(array) <= 0).any():
    raise InputError("times are no rising seconds from 0; give some such as [0, 2.5, 4]")
  return array


def _check_array(source: Any) -> np.ndarray:
  """Returns frames uint8 `[F, H, W, 3]`.

  Raises:
    InputError: `source` is nothing of this kind.
  """
  try:
    frames = np.asarray(source)
  except ValueError as error:  # lists of different lengths
    raise InputError(f"frames are no array ({error}); {_FRAMES}") from error
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
    raise InputError(f"frames are {frames.dtype} {frames.shape}; {_FRAMES}")
  return frames


def _shown(
  times: np.ndarray | None, fps: float, num_frames: int, name: str
) -> tuple[np.ndarray, float]:
  """Returns the time at which each picture is shown, and the one until which the last one is.

  With `times` the last one is shown as long as the others on average: 0 1 5 lasts until 7.5.
  """
  if not num_frames:
    raise InputError(f"{name}: there is no frame; give at least one")
  if times is None:
    return np.arange(num_frames) / fps, num_frames / fps
  if len(times) != num_frames:
    raise InputError(f"times has {len(times)} entries for {num_frames} frames; give one for each")
  mean_step = np.diff(times).mean() if num_frames > 1 else 1.0
  return times, float(times[-1] + mean_step)


def _choose_pictures(
  frame_seconds: np.ndarray,
  end_seconds: float,
  start: float | None,
  end: float | None,
  max_frames: int,
) -> FrameChoice:
  """Chooses all pictures of a part, or evenly spaced ones if they are too many."""
  start, end, frames = part_between(frame_seconds, end_seconds, start, end)
  indices = frames.start + limited_indices(len(frames), max_frames)
  return FrameChoice(indices, end - start, frame_seconds[indices])
