"""The video or the images of a row: which frames, at which times, and what can be wrong with them.

Videos, clips of them and folders of pictures follow the rules of the official training code (see
`annotations`). The times of a clip's frames count from its start, as there.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.features.feature_key import frames_entry, image_entry
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.media.files import exists, is_address, server_failure
from videochat_flash_jax.data.media.frame_sampling import (
  CLIP_FRAMES,
  clip_indices,
  training_indices,
)
from videochat_flash_jax.data.media.image_reader import read_image
from videochat_flash_jax.data.media.image_tiling import choose_grid, cut_tiles, pad_to_square
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import VideoInfo, VideoReader, open_video
from videochat_flash_jax.data.mixture.annotations import (
  annotated_clip,
  media_paths,
  num_clip_frames,
  picture_indices,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow, because
from videochat_flash_jax.errors import InputError

_BEYOND_SECONDS, _BEYOND_SHARE = 1.0, 0.1  # annotators round times, and files are cut again
_TVQA_FPS = 3.0  # of that data set's folders of pictures; those of all others show one a second
ENCODE_AGAIN = "run vcflash data encode with the frames of this run"


class RowVideo(NamedTuple):
  """What is seen of a row's video.

  Attributes:
    clips: uint8 `[C, 4, S, S, 3]`; or features of them, bfloat16 `[C, V, E]`.
    seconds: length of the video, or of its clip.
    frame_seconds: `[4 C]`, when each frame is shown.
    is_damaged: whether others stand in for frames that cannot be read.
  """

  clips: np.ndarray
  seconds: float
  frame_seconds: np.ndarray
  is_damaged: bool = False


class FrameChoice(NamedTuple):
  """Numbers of the frames chosen, and the rest as in `RowVideo`."""

  indices: np.ndarray
  seconds: float
  frame_seconds: np.ndarray


def read_row_video(
  row: Mapping[str, Any], config: ExampleConfig, features: FeatureStore | None = None
) -> RowVideo:
  """Samples frames of the video of a row, or takes their features from a store.

  Raises:
    BrokenRow: there is no such video, it cannot be read, or the row's times do not fit it; or the
      store has no features of these frames.
    OSError: it cannot be read now, which may not last.
  """
  if features is None:
    with open_row_video(row) as video:
      choice = choose_frames(row, video.info, config)
      return RowVideo(read_clips(video, choice, config), *choice[1:], video.damaged)
  path = row_video_path(row)
  info = features.video_info(path)
  if info is None:
    with open_row_video(row) as video:
      info = video.info
  choice = choose_frames(row, info, config)
  with _reading("unreadable video", path):
    entry = frames_entry(path, choice.indices)
  clips = features.get(entry)
  if clips is None:
    raise BrokenRow("no features", f"{path}: not in {features.path}; {ENCODE_AGAIN}")
  return RowVideo(clips, *choice[1:], features.is_damaged(entry))


def row_video_path(row: Mapping[str, Any]) -> str:
  """The path of a row's video.

  Raises:
    BrokenRow: there are several.
  """
  path, *others = media_paths(row, "video")
  if others:
    raise BrokenRow(
      "bad media field", f"{1 + len(others)} videos in one row; give each its own row"
    )
  return path


@contextlib.contextmanager
def open_row_video(row: Mapping[str, Any]) -> Iterator[VideoReader]:
  """Opens the video of a row; raises as `read_row_video`, whatever is read from it."""
  path = row_video_path(row)
  if row.get("video_read_type") == "img" and is_address(path):
    found = f"{path}: folders of pictures are read from this machine only"
    raise BrokenRow("unreadable video", f"{found}; copy it here, or make it a video")
  picture_fps = _TVQA_FPS if "tvqa" in path.lower() else 1.0
  options = {"num_threads": 1, "logs_damage": False}  # whoever counts damaged videos logs them
  with _reading("unreadable video", path), open_video(path, picture_fps, **options) as video:
    yield video


def choose_frames(row: Mapping[str, Any], info: VideoInfo, config: ExampleConfig) -> FrameChoice:
  """Chooses frames of the video of a row.

  Raises:
    BrokenRow: the row's times do not fit the video.
  """
  is_folder, read_type = os.path.isdir(row_video_path(row)), row.get("video_read_type")
  with because("bad times"):
    return FrameChoice(*_sample(info, is_folder, read_type, annotated_clip(row), config))


def read_clips(video: VideoReader, choice: FrameChoice, config: ExampleConfig) -> np.ndarray:
  """The frames chosen, uint8 `[C, 4, S, S, 3]`."""
  frames = video.read(choice.indices, config.image_size)
  return frames.reshape(-1, CLIP_FRAMES, *frames.shape[1:])


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


def choose_grids(
  images: Sequence[np.ndarray], config: ExampleConfig
) -> list[tuple[int, int] | None]:
  """Columns and rows of each image's tiles; None, a padded square, for each of several images."""
  if len(images) > 1:
    return [None] * len(images)
  sizes = ((image.shape[1], image.shape[0]) for image in images)
  return [choose_grid(*size, config.tiling, config.image_size) for size in sizes]


def read_tiles(image: np.ndarray, grid: tuple[int, int] | None, image_size: int) -> np.ndarray:
  """The views of an image, uint8 `[I, 1, S, S, 3]`."""
  with because("unreadable image"):
    if grid is None:
      return resize(pad_to_square(image), image_size)[None, None]
    return cut_tiles(image, *grid, image_size)[:, None]


def tile_features(
  image: np.ndarray, grid: tuple[int, int] | None, features: FeatureStore
) -> np.ndarray:
  """The features of an image's views, bfloat16 `[I, V, E]`.

  Raises:
    BrokenRow: the store has none.
  """
  tiles = features.get(image_entry(image, grid))
  if tiles is None:
    raise BrokenRow("no features", f"an image is not in {features.path}; {ENCODE_AGAIN}")
  return tiles


@contextlib.contextmanager
def _reading(reason: str, path: str) -> Iterator[None]:
  """Whatever a decoder makes of a broken file, it becomes a `BrokenRow`."""
  with because(reason):
    # Whether there is a file at an address shows when it is opened.
    if not is_address(path) and not exists(path):
      raise BrokenRow("missing file", f"{path}: there is no such file; check the path")
    try:
      yield
    except (OSError, InputError):
      raise
    except Exception as error:
      found = f"{path}: {type(error).__name__}: {error}"
      raise BrokenRow(reason, found) from server_failure(error)


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
  seconds = info.num_frames / fps
  if clip is None:
    rate = 1.0 if is_folder else fps  # pictures are counted as seconds, whatever their rate
    indices = training_indices(config.sampling, info.num_frames, rate, num_picks=most, **bounds)
    return indices, seconds, indices / fps
  start, end = clip
  if read_type != "img" and end > seconds + max(_BEYOND_SECONDS, _BEYOND_SHARE * seconds):
    raise InputError(
      f"clip from {start:g} s to {end:g} s ends far beyond a video of {seconds:.2f} s; mend its end"
    )
  if read_type == "img":
    frames = config.sampling, info.num_frames, fps
    indices = picture_indices(*frames, start, end, num_picks=most, **bounds)
    end = min(end, seconds)
  else:
    num_picks = num_clip_frames(end - start, config.sampling, **bounds)
    indices = clip_indices(info.num_frames, fps, start, end, num_picks)
  return indices, end - start, indices / fps - start
