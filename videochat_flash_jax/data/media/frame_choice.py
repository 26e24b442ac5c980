"""Which part of a video is read, which frames of it, and when these are shown."""

from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.media.frame_sampling import (
  fill_clip,
  inference_indices,
  limited_indices,
)
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig


class VideoPart(NamedTuple):
  """The part of a video that is read: from `start` to `end`, or all.

  Attributes:
    start: its first second.
    end: the second at which it ends.
    frames: of the video, inside this part.
    fps: frames a second.
  """

  start: float
  end: float
  frames: range
  fps: float


class FrameChoice(NamedTuple):
  """The frames that are chosen from a video.

  Attributes:
    indices: of the chosen frames, int64 `[T]` with T in whole clips; a repeat fills its clip.
    seconds: length of the video, or of the part of it that is read.
    frame_seconds: `[T]`, the time at which each frame is shown.
  """

  indices: np.ndarray
  seconds: float
  frame_seconds: np.ndarray


def sampled_frames(
  part: VideoPart,
  sampling: SamplingConfig,
  max_frames: int | None = None,
  picks_per_second: float | None = None,
) -> FrameChoice:
  """Chooses the frames of a part of a video that are watched for an answer.

  By default they are chosen as `inference_indices` says. With `picks_per_second` the model's lower
  bound does not count: at most so many frames a second are chosen, and at most `max_frames` (by
  default the model's upper bound), as `limited_indices` says.

  10 s of a video at 30 fps, picks_per_second=2:
    max_frames=None   20 frames, the middles of half seconds
    max_frames=10     8 frames in two clips, evenly spaced
  """
  if picks_per_second is None:
    picks = inference_indices(len(part.frames), part.fps, sampling, max_frames)
  else:
    wanted = round((part.end - part.start) * picks_per_second, 6)  # 0.57 * 100 is 56.99...
    limit = int(min(wanted, max_frames or sampling.max_frames))
    picks = limited_indices(len(part.frames), max(1, limit))
  indices = part.frames.start + picks
  return FrameChoice(indices, part.end - part.start, indices / part.fps)


def frames_at(part: VideoPart, times: np.ndarray) -> FrameChoice:
  """Chooses the frames that are shown at times which the user chose; these times are kept.

  Args:
    part: that is watched.
    times: in seconds of the video, `[N]`; the last one is repeated to fill its clip.

  Raises:
    InputError: a time lies outside the part.
  """
  outside = np.flatnonzero((times < part.start) | (times > part.end))
  if len(outside):
    raise InputError(
      f"times[{outside[0]}] is {times[outside[0]]:g}: give seconds from {part.start:g} to "
      f"{part.end:.2f}"
    )
  indices = np.searchsorted(np.array(part.frames) / part.fps, times, "right") - 1
  indices = fill_clip(part.frames.start + indices)
  return FrameChoice(indices, part.end - part.start, fill_clip(times))


def part_between(
  frame_seconds: np.ndarray, end_seconds: float, start: float | None, end: float | None
) -> tuple[float, float, range]:
  """Finds the frames that are shown from `start` to `end`.

  A frame is shown until the next one is. Four frames at 0 1 2 3 s, the last one until 4 s:
    start=1.5        1.5 s to 4 s, frames 1 2 3
    start=1, end=3   1 s to 3 s, frames 1 2
    end=99           0 s to 4 s, all frames

  Args:
    frame_seconds: `[F]`, rising, the time at which each frame is shown.
    end_seconds: the time until which the last one is shown.
    start: in seconds; None for the first frame.
    end: in seconds; None, and any time after the video, mean its end.

  Returns:
    The times at which this part starts and ends, and its frames.

  Raises:
    InputError: the video ends before `start`, or begins after `end`.
  """
  first = float(frame_seconds[0])
  start = first if start is None else max(start, first)
  if start >= end_seconds:
    raise InputError(
      f"start is {start:g}: the video ends at {end_seconds:.2f} s; give an earlier start"
    )
  end = end_seconds if end is None else min(end, end_seconds)
  if end <= start:
    raise InputError(f"end is {end:g}: the video begins at {first:g} s; give a later end")
  begin = int(np.searchsorted(frame_seconds, start, "right")) - 1
  return start, end, range(begin, int(np.searchsorted(frame_seconds, end)))
