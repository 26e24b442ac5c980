"""Which frames of a video the model sees.

Frames are numbered in presentation order from 0. Every function returns int64 indices that never
decrease. The rules are those of the original (its training reader and its `load_video`), with
two repairs that no released weight depends on: a misspelt sampling word is an error, and the
indices of a clip count from the start of the video.
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
  `dynamic_num_frames`. `max_frames`, the user's wish, replaces the model's own upper bound and
  wins over its lower bound too. It is rounded down to whole clips; below one clip, that many
  different frames are shown, and the last one is repeated.

  A video of 10 frames at 1 fps, min_frames=4, local_frames=4:
    max_frames=None  0 1 2 3 5 6 7 8
    max_frames=7     0 3 5 8
    max_frames=1     4 4 4 4

  Raises:
    InputError: the video has no frame, or `max_frames` is not positive.
  """
  if max_frames is None:
    max_frames = sampling.max_frames
  if max_frames < 1:
    raise InputError(f"max_frames is {max_frames}: give at least 1")
  if max_frames > CLIP_FRAMES:
    max_frames -= max_frames % CLIP_FRAMES
  num_picks = dynamic_num_frames(
    num_frames,
    fps,
    min_frames=min(sampling.min_frames, max_frames),
    max_frames=max_frames,
    local_frames=sampling.local_frames,
  )
  picks = interval_indices(num_frames, num_picks)
  return np.pad(picks, (0, -len(picks) % CLIP_FRAMES), mode="edge")


def dynamic_num_frames(
  num_frames: int, fps: float, *, min_frames: int, max_frames: int | None, local_frames: int
) -> int:
  """Counts the frames to pick: one a second, in groups of `local_frames`, within bounds.

  With local_frames=4 at 1 fps: 3 frames give 4, and so do 7; 8 give 8; and 300 give 64 if
  max_frames=64. The lower bound wins over the upper one. A video with fewer frames than
  min_frames lowers it to the groups it can fill: 7 frames, min_frames=64 give 4.
  """
  if num_frames < min_frames:
    min_frames = num_frames // local_frames * local_frames
  num_groups = int(num_frames / fps // local_frames)
  num_picks = local_frames * max(1, num_groups)
  if max_frames is not None:
    num_picks = min(num_picks, max_frames)
  return max(num_picks, min_frames)


def interval_indices(num_frames: int, num_picks: int, offset: int | None = None) -> np.ndarray:
  """Cuts the video into equal intervals and takes the middle frame of each.

  10 frames, 4 picks: the intervals start at 0 2 5 7, their middles are 0 3 5 8; offset=0 takes
  0 2 5 7, i.e. `offset` frames from each start. A video with fewer frames than picks repeats
  the last one: 3 frames, 4 picks give 0 1 2 2.

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
  """Takes the frame nearest to the middle of each step of time, from the start on.

  10 frames at 2 fps, one pick a second: the middles 0.5 1.5 2.5 3.5 4.5 s are frames 1 3 5 7 9;
  max_frames=2 keeps 1 3. A video shorter than half a step gives none.
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
    middle        4 frames, the middles of 4 intervals (max_frames is not looked at): 2 7 12 17
    dynamic_fps1  num_picks is not looked at; 8 frames for 10 s, cut to 3: 2 9 16
    fps0.5        one frame every 2 s from the start, cut to 3: 2 6 10

  Args:
    sample: `middle`, `dynamic_fps1` or `fps` followed by a number of frames a second.
    num_frames: frames in the video.
    fps: frames a second of the video.
    num_picks: frames wanted by `middle`.
    min_frames: at least this many frames for `middle` and `dynamic_fps1`, if the video has them.
    max_frames: at most this many for `dynamic_fps1` and `fpsX`, where it exceeds min_frames.
    local_frames: group size of `dynamic_fps1`.
    offset: frame of each interval, counted from its start; by default its middle.

  Raises:
    InputError: an unknown word, or a video without frames.
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
    f"unknown sampling {sample!r}: use middle, dynamic_fps1, or fps and a rate such as fps0.5"
  )


def spread_indices(num_frames: int, num_picks: int) -> np.ndarray:
  """Spreads picks evenly over a clip, as the original's reader of annotated clips does.

  10 frames, 4 picks: the spacing is 9 / 4 = 2.25, the first pick floor(2.25 / 2) = 1, the
  others round(2.25 i) further on: 1 3 5 8.
  """
  spacing = (num_frames - 1) / num_picks
  return int(spacing / 2) + np.round(spacing * np.arange(num_picks)).astype(np.int64)


def clip_indices(
  num_frames: int, fps: float, start_seconds: float, end_seconds: float, num_picks: int
) -> np.ndarray:
  """Spreads picks over the part of a video between two times.

  300 frames at 30 fps, 5 s to 9 s, 4 picks: the clip is frames 150 to 269, the picks are 14 44
  74 103 into it, so 164 194 224 253. (The original counted these from 0 again after it had gone
  to the clip's start, and so returned consecutive frames there.)

  Raises:
    InputError: the clip ends before it starts, or lies outside the video.
  """
  first = max(0, int(start_seconds * fps))
  last = min(num_frames, int(end_seconds * fps))
  if first >= last:
    raise InputError(
      f"clip from {start_seconds:g} s to {end_seconds:g} s holds no frame of a video of "
      f"{num_frames / fps:.2f} s: mend its start and end"
    )
  return first + spread_indices(last - first, num_picks)
