"""Chooses which frames of a video the model sees.

Frames are numbered in presentation order from 0. Every function that picks frames returns their
indices, int64 `[T]`, in an order that never decreases. The rules are those of the original (its
training reader and its `load_video`), with two corrections on which no released weight depends: a
misspelt sampling word is an error, and the indices of a clip count from the start of the video.
"""

import re

import numpy as np

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig

CLIP_FRAMES = 4  # the encoders see four frames at a time


def inference_indices(
  num_frames: int, fps: float, sampling: SamplingConfig, max_frames: int | None = None
) -> np.ndarray:
  """Picks the frames to watch for an answer: one a second within bounds, a multiple of four.

  T = max(min_frames, min(local_frames * floor(seconds / local_frames), max_frames)), see
  `dynamic_num_frames`. The argument `max_frames`, which the user may give, replaces the upper bound
  of the model, and it wins over the lower bound too. It is rounded down to whole clips of four. If
  it is less than four, that many different frames are picked, and the last one is repeated to fill
  the clip.

  A video of 10 frames at 1 fps, min_frames=4, local_frames=4:
    max_frames=None  0 1 2 3 5 6 7 8
    max_frames=7     0 3 5 8
    max_frames=1     4 4 4 4

  Returns:
    int64 `[T]`.

  Raises:
    InputError: the video has no frame, or `max_frames` is not positive.
  """
  if max_frames is None:
    max_frames = sampling.max_frames
  if max_frames < 1:
    raise InputError(f"max_frames is {max_frames}: give at least 1")
  max_frames = whole_clips(max_frames)
  num_picks = dynamic_num_frames(
    num_frames,
    fps,
    min_frames=min(sampling.min_frames, max_frames),
    max_frames=max_frames,
    local_frames=sampling.local_frames,
  )
  return fill_clip(interval_indices(num_frames, num_picks))


def dynamic_num_frames(
  num_frames: int, fps: float, *, min_frames: int, max_frames: int | None, local_frames: int
) -> int:
  """Counts the frames to pick: one a second, in groups of `local_frames`, within bounds.

  With local_frames=4 at 1 fps: 3 frames give 4, and so do 7; 8 give 8; and 300 give 64 if
  max_frames=64. The lower bound wins over the upper one. If the video has fewer frames than
  min_frames, the lower bound becomes the number of frames in the whole groups that it can fill: 7
  frames with min_frames=64 give 4.
  """
  if num_frames < min_frames:
    min_frames = num_frames // local_frames * local_frames
  num_groups = int(num_frames / fps // local_frames)
  num_picks = local_frames * max(1, num_groups)
  if max_frames is not None:
    num_picks = min(num_picks, max_frames)
  return max(num_picks, min_frames)


def limited_indices(num_frames: int, limit: int) -> np.ndarray:
  """Picks all frames, or evenly spaced ones if there are more than `limit`; whole clips of four.

  `limit` is rounded down to whole clips. If it is less than four, that many frames are picked. The
  last frame is repeated to fill its clip.

  A video of 10 frames:
    limit=10   0 1 2 3 4 5 6 7 8 9 9 9
    limit=9    0 1 2 3 5 6 7 8
    limit=3    1 4 7 7

  Returns:
    int64 `[T]`.
  """
  num_picks = num_frames if num_frames <= limit else whole_clips(limit)
  return fill_clip(interval_indices(num_frames, num_picks))


def whole_clips(num_frames: int) -> int:
  """Rounds a number of frames down to whole clips; fewer than four frames stay as they are."""
  return num_frames if num_frames < CLIP_FRAMES else num_frames - num_frames % CLIP_FRAMES


def fill_clip(picks: np.ndarray) -> np.ndarray:
  """Repeats the last frame until the clip is full: 1 4 7 gives 1 4 7 7."""
  return np.pad(picks, (0, -len(picks) % CLIP_FRAMES), mode="edge")


def interval_indices(num_frames: int, num_picks: int, offset: int | None = None) -> np.ndarray:
  """Cuts the video into equal intervals and picks the middle frame of each.

  10 frames, 4 picks: the intervals start at 0 2 5 7, and their middles are 0 3 5 8. With `offset`,
  the frame that many frames after the start of each interval is picked: offset=0 gives 0 2 5 7. If
  the video has fewer frames than picks, its last frame is repeated: 3 frames, 4 picks give 0 1 2 2.

  Returns:
    int64 `[num_picks]`.

  Raises:
    InputError: the video has no frame.
  """
  if num_frames < 1:
    raise InputError("the video has no frame to sample: give a video with at least one")
  edges = np.linspace(0, num_frames, min(num_picks, num_frames) + 1).astype(np.int64)
  picks = (edges[:-1] + edges[1:] - 1) // 2 if offset is None else edges[:-1] + offset
  return np.pad(picks, (0, num_picks - len(picks)), mode="edge")


def fixed_rate_indices(
  num_frames: int, fps: float, picks_per_second: float, max_frames: int | None = None
) -> np.ndarray:
  """Picks the frame nearest to the middle of each time step, beginning at the start of the video.

  10 frames at 2 fps, one pick a second: the middles 0.5 1.5 2.5 3.5 4.5 s are frames 1 3 5 7 9;
  max_frames=2 keeps 1 3. A video shorter than half a step gives no frame.
  """
  step = 1 / picks_per_second
  seconds = np.arange(step / 2, num_frames / fps + step / 2, step)
  picks = np.around(seconds * fps).astype(np.int64)
  return picks[picks < num_frames][:max_frames]


def training_indices(
  sample: str,
  num_frames: int,
  fps: float,
  *,
  num_picks: int,
  min_frames: int = 1,
  max_frames: int | None = None,
  local_frames: int = 4,
  offset: int | None = None,
) -> np.ndarray:
  """Picks frames by the sampling word of a training run.

  The words, with 20 frames at 2 fps, num_picks=4 and max_frames=3:
    middle        4 frames, the middles of 4 intervals (max_frames is ignored): 2 7 12 17
    dynamic_fps1  num_picks is ignored; 8 frames for 10 s, cut to 3: 2 9 16
    fps0.5        one frame every 2 s from the start, cut to 3: 2 6 10

  Args:
    sample: `middle`, `dynamic_fps1`, or `fps` followed by a number of frames a second.
    num_frames: frames in the video.
    fps: frames a second of the video.
    num_picks: frames that `middle` picks.
    min_frames: lower bound for `middle` and `dynamic_fps1`, if the video has that many frames.
    max_frames: upper bound for `dynamic_fps1` and `fpsX`; for `dynamic_fps1` the lower bound wins
      over it.
    local_frames: group size of `dynamic_fps1`.
    offset: which frame of each interval is picked, counted from its start; by default the middle.

  Returns:
    int64 `[T]`.

  Raises:
    InputError: the word is unknown, or the video has no frame.
  """
  if sample == "middle":
    return interval_indices(num_frames, max(num_picks, min(min_frames, num_frames)), offset)
  if sample == "dynamic_fps1":
    num_picks = dynamic_num_frames(
      num_frames, fps, min_frames=min_frames, max_frames=max_frames, local_frames=local_frames
    )
    return interval_indices(num_frames, num_picks, offset)
  rate = re.fullmatch(r"fps(\d+\.?\d*|\.\d+)", sample)
  if rate and float(rate[1]) > 0:
    return fixed_rate_indices(num_frames, fps, float(rate[1]), max_frames)
  raise InputError(
    f"unknown sampling {sample!r:.80}: use middle, dynamic_fps1, or fps and a rate such as fps0.5"
  )


def evenly_spaced_indices(num_frames: int, num_picks: int) -> np.ndarray:
  """Picks evenly spaced frames of a clip, as the original's reader of annotated clips does.

  10 frames, 4 picks: the spacing is 9 / 4 = 2.25, the first pick is floor(2.25 / 2) = 1, and the
  i-th pick is round(2.25 i) after it: 1 3 5 8.

  Returns:
    int64 `[num_picks]`.
  """
  spacing = (num_frames - 1) / num_picks
  return int(spacing / 2) + np.round(spacing * np.arange(num_picks)).astype(np.int64)


def clip_range(num_frames: int, fps: float, start_seconds: float, end_seconds: float) -> range:
  """Returns the frames of a video between two times: 5 s to 9 s at 30 fps are frames 150 to 269.

  Raises:
    InputError: the clip ends before it starts, or lies outside the video.
  """
  frames = range(max(0, int(start_seconds * fps)), min(num_frames, int(end_seconds * fps)))
  if not frames:
    raise InputError(
      f"clip from {start_seconds:g} s to {end_seconds:g} s holds no frame of a video of "
      f"{num_frames / fps:.2f} s: correct its start and end"
    )
  return frames


def clip_indices(
  num_frames: int, fps: float, start_seconds: float, end_seconds: float, num_picks: int
) -> np.ndarray:
  """Picks evenly spaced frames of the part of a video between two times.

  300 frames at 30 fps, 5 s to 9 s, 4 picks: the clip is frames 150 to 269. The picks are frames 14
  44 74 103 of the clip, so frames 164 194 224 253 of the video. (The original sought the start of
  the clip and then counted these from 0 again, and so returned consecutive frames there.)

  Returns:
    int64 `[num_picks]`.

  Raises:
    InputError: as in `clip_range`.
  """
  frames = clip_range(num_frames, fps, start_seconds, end_seconds)
  return frames.start + evenly_spaced_indices(len(frames), num_picks)
