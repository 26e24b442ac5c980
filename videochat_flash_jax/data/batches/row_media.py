"""Reads the video or the images of an annotation row: chooses frames, and names what is wrong.

Videos, parts of videos ("clips" of an annotation, from `start` to `end`) and folders of pictures
follow the rules of the official training code (see `annotations`). As in that code, the times of
the frames of such a part count from its start.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.features.feature_key import frames_entry, image_entry
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.media.files import exists, is_address, server_failure
from videochat_flash_jax.data.media.frame_choice import FrameChoice, VideoPart
from videochat_flash_jax.data.media.frame_sampling import (
  CLIP_FRAMES,
  clip_indices,
  clip_range,
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

# An annotated end may lie after the end of the video by this much: annotators round times, and some
# files were cut again later.
_BEYOND_SECONDS, _BEYOND_SHARE = 1.0, 0.1
# Frame rate of the picture folders of the data set TVQA; all others have one picture a second.
_TVQA_FPS = 3.0
ENCODE_AGAIN = "run vcflash data encode with the frames of this run"


class RowVideo(NamedTuple):
  """The sampled frames of a row's video.

  Attributes:
    clips: uint8 `[C, 4, S, S, 3]`; or features of them, bfloat16 `[C, V, E]`.
    seconds: length of the video, or of the annotated part of it.
    frame_seconds: `[4 C]`, the time at which each frame is shown.
    is_damaged: whether some frames could not be read, so that other frames replace them.
  """

  clips: np.ndarray
  seconds: float
  frame_seconds: np.ndarray
  is_damaged: bool = False


def read_row_video(
  row: Mapping[str, Any], config: ExampleConfig, features: FeatureStore | None = None
) -> RowVideo:
  """Samples frames of the video of a row, or gets their features from a store.

  Raises:
    BrokenRow: there is no such video, it cannot be read, the row's times do not fit it, or the
      store has no features of these frames.
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
  """Returns the path of a row's video.

  Raises:
    BrokenRow: the row has several videos.
  """
  path, *others = media_paths(row, "video")
  if others:
    raise BrokenRow(
      "bad media field", f"{1 + len(others)} videos in one row; give each its own row"
    )
  return path


class _RowVideo(VideoReader):
  """A video of which any fault that shows in reading is a `BrokenRow`."""

  def __init__(self, reader: VideoReader):
    self.path, self.info, self._reader = reader.path, reader.info, reader

  @property
  def damaged(self) -> bool:
    return self._reader.damaged

  def frames(self, indices: Iterable[int], image_size=None) -> Iterator[np.ndarray]:
    with _reading("unreadable video", str(self.path)):
      yield from self._reader.frames(indices, image_size)

  def close(self) -> None:
    self._reader.close()


def open_row_video(
  row: Mapping[str, Any], num_threads: int | None = 1, logs_damage: bool = False
) -> VideoReader:
  """Opens the video of a row.

  Args:
    row: a row with full paths.
    num_threads: as in `open_video`.
    logs_damage: as in `open_video`; of a run's damaged videos, `BrokenShare` writes the log.

  Raises:
    BrokenRow: there is no such video, or it cannot be read; reading its frames raises it, too.
  """
  path = row_video_path(row)
  if row.get("video_read_type") == "img" and is_address(path):
    found = f"{path}: folders of pictures can only be read from this machine"
    raise BrokenRow("unreadable video", f"{found}; copy it here, or make it a video")
  picture_fps = _TVQA_FPS if "tvqa" in path.lower() else 1.0
  with _reading("unreadable video", path):
    return _RowVideo(open_video(path, picture_fps, num_threads, logs_damage))


def row_part(row: Mapping[str, Any], info: VideoInfo) -> VideoPart:
  """Finds the part of a video that a row is about.

  Raises:
    BrokenRow: the row's times do not fit the video.
  """
  read_type = row.get("video_read_type")
  fps = 1.0 if read_type == "gif" else info.fps
  seconds = info.num_frames / fps
  with because("bad times"):
    clip = annotated_clip(row)
    if clip is None:
      return VideoPart(0.0, seconds, range(info.num_frames), fps)
    start, end = clip
    if read_type == "img":
      end = min(end, seconds)
    elif end > seconds + max(_BEYOND_SECONDS, _BEYOND_SHARE * seconds):
      raise InputError(
        f"clip from {start:g} s to {end:g} s ends long after a video of {seconds:.2f} s; correct "
        "its end"
      )
    return VideoPart(start, end, clip_range(info.num_frames, fps, start, end), fps)


def choose_frames(row: Mapping[str, Any], info: VideoInfo, config: ExampleConfig) -> FrameChoice:
  """Chooses the frames of the video of a row.

  Raises:
    BrokenRow: the row's times do not fit the video.
  """
  (min_frames, max_frames), sample, num_frames = config.frames, config.sampling, info.num_frames
  bounds = {"min_frames": min_frames, "max_frames": max_frames, "local_frames": CLIP_FRAMES}
  start, end, _, fps = row_part(row, info)
  with because("bad times"):
    if annotated_clip(row) is None:
      # Each picture of a folder counts as one second, whatever its rate.
      rate = 1.0 if os.path.isdir(row_video_path(row)) else fps
      indices = training_indices(sample, num_frames, rate, num_picks=max_frames, **bounds)
    elif row.get("video_read_type") == "img":
      times = fps, start, end
      indices = picture_indices(sample, num_frames, *times, num_picks=max_frames, **bounds)
    else:
      num_picks = num_clip_frames(end - start, sample, **bounds)
      indices = clip_indices(num_frames, fps, start, end, num_picks)
  return FrameChoice(indices, end - start, indices / fps - start)


def read_clips(video: VideoReader, choice: FrameChoice, config: ExampleConfig) -> np.ndarray:
  """Reads the chosen frames, uint8 `[C, 4, S, S, 3]`."""
  frames = video.read(choice.indices, config.image_size)
  return frames.reshape(-1, CLIP_FRAMES, *frames.shape[1:])


def read_row_images(row: Mapping[str, Any]) -> list[np.ndarray]:
  """Reads all images of a row, each uint8 `[H, W, 3]` with its own size; [] if there are none.

  Raises:
    BrokenRow: there is no such image, or it cannot be read.
  """
  images = []
  for path in media_paths(row, "image") if row.get("image") is not None else []:
    with _reading("unreadable image", path):
      images.append(read_image(path))
  return images


def choose_grids(
  images: Sequence[np.ndarray], config: ExampleConfig
) -> list[tuple[int, int] | None]:
  """Returns (columns, rows) of the tiles of a single image.

  Of several images each one becomes a padded square without tiles: then each entry is None.
  """
  if len(images) > 1:
    return [None] * len(images)
  sizes = ((image.shape[1], image.shape[0]) for image in images)
  return [choose_grid(*size, config.tiling, config.image_size) for size in sizes]


def read_tiles(image: np.ndarray, grid: tuple[int, int] | None, image_size: int) -> np.ndarray:
  """Returns the tiles and the base view of an image, or its padded square.

  They are uint8 `[I, 1, S, S, 3]`.
  """
  with because("unreadable image"):
    if grid is None:
      return resize(pad_to_square(image), image_size)[None, None]
    return cut_tiles(image, *grid, image_size)[:, None]


def tile_features(
  image: np.ndarray, grid: tuple[int, int] | None, features: FeatureStore
) -> np.ndarray:
  """Returns the stored features of what `read_tiles` would read, bfloat16 `[I, V, E]`.

  Raises:
    BrokenRow: the store has no features of this image.
  """
  tiles = features.get(image_entry(image, grid))
  if tiles is None:
    raise BrokenRow("no features", f"an image is not in {features.path}; {ENCODE_AGAIN}")
  return tiles


@contextlib.contextmanager
def _reading(reason: str, path: str) -> Iterator[None]:
  """Turns whatever error a decoder raises for a broken file into a `BrokenRow`.

  Its cause is the error, which tells whether the file may be readable later.
  """
  with because(reason):
    # Whether there is a file at a web address is only known once it is opened.
    if not is_address(path) and not exists(path):
      raise BrokenRow("missing file", f"{path}: there is no such file; check the path")
    try:
      yield
    except (FileNotFoundError, InputError):
      raise
    except OSError as error:
      raise BrokenRow(reason, f"{path}: {error.strerror or error}") from error
    except Exception as error:
      found = f"{path}: {type(error).__name__}: {error}"
      raise BrokenRow(reason, found) from server_failure(error)
