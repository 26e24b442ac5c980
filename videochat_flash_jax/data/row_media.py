"""The video or the images of a row: which frames, at which times, and what can be wrong with them.

Videos, clips of them and folders of pictures follow the rules of the official training code (see
`annotations`). The times of a clip's frames count from its start, as there.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from videochat_flash_jax.data.annotations import (
  annotated_clip,
  media_paths,
  num_clip_frames,
  picture_indices,
)
from videochat_flash_jax.data.broken import BrokenRow, because
from videochat_flash_jax.data.data_config import ExampleConfig
from videochat_flash_jax.data.frame_sampling import CLIP_FRAMES, clip_indices, training_indices
from videochat_flash_jax.data.image_reader import read_image
from videochat_flash_jax.data.media_files import exists
from videochat_flash_jax.data.video_reader import VideoInfo, open_video
from videochat_flash_jax.errors import InputError

_TVQA_FPS = 3.0  # of that data set's folders of pictures; those of all others show one a second


class RowVideo(NamedTuple):
  """What is seen of a row's video.

  Attributes:
    frames: uint8 `[F, S, S, 3]`, F a multiple of 4.
    seconds: length of the video, or of its clip.
    frame_seconds: `[F]`, when each frame is shown.
  """

  frames: np.ndarray
  seconds: float
  frame_seconds: np.ndarray


def read_row_video(row: Mapping[str, Any], config: ExampleConfig) -> RowVideo:
  """Samples frames of the video of a row.

  Raises:
    BrokenRow: there is no such video, it cannot be read, or the row's times do not fit it.
    OSError: it cannot be read now, which may not last.
  """
  path, *others = media_paths(row, "video")
  if others:
    raise BrokenRow(
      "bad media field", f"{1 + len(others)} videos in one row; give each its own row"
    )
  with because("bad times"):
    clip = annotated_clip(row)
  read_type = row.get("video_read_type")
  picture_fps = _TVQA_FPS if "tvqa" in path.lower() else 1.0
  with _reading("unreadable video", path), open_video(path, picture_fps, num_threads=1) as video:
    with because("bad times"):
      indices, seconds, times = _sample(video.info, os.path.isdir(path), read_type, clip, config)
    return RowVideo(video.read(indices, config.image_size), seconds, times)


def read_row_images(row: Mapping[str, Any]) -> list[np.ndarray]:
  """All images of a row, each uint8 `[H, W, 3]` of its own size; none if it has no image.

  Raises:
    BrokenRow: there is no such image, or it cannot be read.
    OSError: it cannot be read now, which may not last.
  """
  images = []
  for path in media_paths(row, "image") if row.get("image") is not None else []:
    with _reading("unreadable image", path):
      images.append(read_image(path))
  return images


@contextlib.contextmanager
def _reading(reason: str, path: str) -> Iterator[None]:
  """Whatever a decoder makes of a broken file, it becomes a `BrokenRow`."""
  with because(reason):
    if not exists(path):
      raise BrokenRow("missing file", f"{path}: there is no such file; check the path")
    try:
      yield
    except (OSError, InputError):
      raise
    except Exception as error:
      raise BrokenRow(reason, f"{path}: {type(error).__name__}: {error}") from error


def _sample(
  info: VideoInfo,
  is_folder: bool,
  read_type: str | None,
  clip: tuple[float, float] | None,
  config: ExampleConfig,
) -> tuple[np.ndarray, float, np.ndarray]:
  """Frame numbers, the length in seconds, and the frames' times."""
  least, most = config.frames
  bounds = {"min_frames": least, "max_frames": most, "local_frames": CLIP_FRAMES}
  fps = 1.0 if read_type == "gif" else info.fps
  if clip is None:
    rate = 1.0 if is_folder else fps  # pictures are counted as seconds, whatever their rate
    indices = training_indices(config.sampling, info.num_frames, rate, num_picks=most, **bounds)
    return indices, info.num_frames / fps, indices / fps
  start, end = clip
  if read_type == "img":
    frames = config.sampling, info.num_frames, fps
    indices = picture_indices(*frames, start, end, num_picks=most, **bounds)
    end = min(end, info.num_frames / fps)
  else:
    num_picks = num_clip_frames(end - start, config.sampling, **bounds)
    indices = clip_indices(info.num_frames, fps, start, end, num_picks)
  return indices, end - start, indices / fps - start
