"""Reads chosen frames of a video without decoding all the others.

First all packets of the file are read without decoding. This gives the time stamp of every frame,
the order in which frames are shown, and the key frames, at which decoding can start. The chosen
frames are then cut into segments, and the decoder jumps between segments. If the frames are
resized, several segments are decoded at the same time, each by its own decoder. Otherwise one
decoder, with several threads, decodes the segments sequentially.

  with open_video("match.mp4") as video:
    frames = video.read([0, 30, 60], image_size=224)  # uint8 [3, 224, 224, 3]
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from videochat_flash_jax.data.media.files import check_regular, file_stamp, is_address
from videochat_flash_jax.data.media.image_reader import read_image
from videochat_flash_jax.data.media.picture_folder import list_pictures
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_decoder import VideoDecoder
from videochat_flash_jax.data.media.video_timeline import Timeline
from videochat_flash_jax.errors import InputError, one_line
from videochat_flash_jax.fields import (
  Rule,
  argument,
  count,
  is_integer,
  is_pair,
  number,
  optional,
)

_logger = logging.getLogger("videochat_flash_jax")
_MAX_THREADS = 4  # each thread holds its own frames
_NUM_KNOWN = 4  # an hour of video takes some megabytes
# Timelines and (height, width) of the files opened last: several questions about one film need them
# only once. The key holds the size and the time of a file, so a changed file is read again.
known_files: dict[tuple[Path, int, int], tuple[Timeline, tuple[int, int]]] = {}
_known_files_lock = threading.Lock()
_Result = TypeVar("_Result")
_ImageSize = tuple[int, int] | None
_INTEGER = Rule(is_integer, "an integer")
_SIDE = Rule(lambda n: is_integer(n) and 0 < n <= 1 << 15, "pixels, from 1 to 32768")


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """Length, frame rate and size of a video.

  Attributes:
    num_frames: number of frames.
    fps: frames a second.
    seconds: the length, num_frames / fps.
    height: of a frame as it is shown (a rotation is applied), in pixels.
    width: of a frame as it is shown, in pixels.
  """

  num_frames: int
  fps: float
  seconds: float
  height: int
  width: int


def open_video(
  path: str | Path,
  picture_fps: float = 1.0,
  num_threads: int | None = None,
  logs_damage: bool = True,
) -> "VideoReader":
  """Opens a video file, or a folder of numbered pictures.

  Args:
    path: the file, its address, or the folder.
    picture_fps: pictures shown a second, if `path` is a folder.
    num_threads: threads that decode; by default one for each core, up to four. Give 1 where several
      processes read at the same time.
    logs_damage: whether to log once that the video has damaged frames, when the first is read.

  Raises:
    InputError: there is no such file, it is a pipe or a playlist, or no frame can be read from it;
      or an argument is of another type.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise InputError(f"{path!r:.100} is not a path; give a video file or a folder of pictures")
  picture_fps = argument("picture_fps", picture_fps, number(above=0))
  num_threads = argument("num_threads", num_threads, optional(count()))
  if is_address(path):
    return _VideoFile(str(path), num_threads, logs_damage)
  path = Path(path)
  if os.path.isdir(path):  # unlike `Path.is_dir`, it raises no error for a path that is too long
    return _PictureFolder(path, picture_fps)
  if not os.path.exists(path):
    raise InputError(f"{path}: there is no such video file or folder; check the path")
  check_regular(path)
  if path.stat().st_size == 0:
    raise InputError(f"{path}: the file is empty; copy or download it again")
  return _VideoFile(path, num_threads, logs_damage)


class VideoReader:
  """A video from which any frame can be read; frame i is the i-th one shown, from 0.

  Attributes:
    path: of the file or the folder.
    info: length, frame rate and size.
    damaged: whether a frame read so far was repaired by the decoder, or replaced by a later one.
  """

  path: Path
  info: VideoInfo
  damaged = False

  def read(
    self, indices: Sequence[int] | np.ndarray, image_size: int | tuple[int, int] | None = None
  ) -> np.ndarray:
    """Returns the frames `indices`, in this order, as uint8 `[F, H, W, 3]`; see `frames`."""
    frames = list(self.frames(indices, image_size))
    if frames:
      return np.stack(frames)
    height, width = _size_of(image_size) or (self.info.height, self.info.width)
    return np.empty((0, height, width, 3), np.uint8)

  def frames(
    self, indices: Iterable[int], image_size: int | tuple[int, int] | None = None
  ) -> Iterator[np.ndarray]:
    """Yields the frames `indices` one by one as they are decoded, each uint8 `[H, W, 3]`.

    The indices may have any order and may repeat; rising indices are fastest.

    Args:
      indices: indices of frames, from 0.
      image_size: each frame is resized at once to a square of this side, or to (height, width), in
        pixels. Then each thread holds at most one frame of the video's own size.

    Raises:
      InputError: the file ends early or cannot be decoded, or its frames differ in size and no
        `image_size` is given; or an argument is of another type.
      IndexError: there is no such frame.
    """
    image_size = _size_of(image_size)
    indices = [argument("index of a frame", index, _INTEGER) for index in indices]
    for index in indices:
      if not 0 <= index < self.info.num_frames:
        raise IndexError(f"{self.path}: frame {index} of {self.info.num_frames}")
    repeats = [(index, len(list(same))) for index, same in itertools.groupby(indices)]
    frames = self._frames([index for index, _ in repeats], image_size)
    for (_, times), frame in zip(repeats, frames, strict=True):
      yield from itertools.repeat(frame, times)

  def close(self) -> None:
    """Closes the file."""

  def _frames(self, indices: list[int], image_size: _ImageSize) -> Iterator[np.ndarray]:
    """Does the work of `frames`. All indices exist, and no two neighbours are equal."""
    raise NotImplementedError

  def _fit(self, index: int, frame: np.ndarray, image_size: _ImageSize) -> np.ndarray:
    """Resizes a frame, or checks that it is as large as the first one."""
    if image_size is not None:
      return resize(frame, image_size)
    if frame.shape[:2] != (self.info.height, self.info.width):
      raise InputError(
        f"{self.path}: frame {index} is {frame.shape[1]}x{frame.shape[0]}, the first one is "
        f"{self.info.width}x{self.info.height}; give image_size, or a video with frames of one size"
      )
    return frame

  def __enter__(self) -> "VideoReader":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def _size_of(image_size: int | tuple[int, int] | None) -> _ImageSize:
  """Returns (height, width) of what is given as `image_size`, or None."""
  if image_size is None:
    return None
  sides = image_size if is_pair(image_size) else (image_size, image_size)
  height, width = (argument("image_size", side, _SIDE) for side in sides)
  return height, width


class _PictureFolder(VideoReader):
  """A folder of pictures, in natural order."""

  def __init__(self, path: Path, fps: float):
    self.path = path
    self._pictures = list_pictures(path)
    num_frames = len(self._pictures)
    height, width = read_image(self._pictures[0]).shape[:2]
    self.info = VideoInfo(num_frames, fps, num_frames / fps, height, width)

  def _frames(self, indices, image_size):
    for index in indices:
      yield self._fit(index, read_image(self._pictures[index]), image_size)


class _VideoFile(VideoReader):
  """A file that FFmpeg can decode."""

  def __init__(self, path: str | Path, num_threads: int | None, logs_damage: bool):
    self.path, self._logs_damage = path, logs_damage
    self._num_threads = num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
    # Decoders that nobody uses now, by their number of threads.
    self._idle: dict[int, list[VideoDecoder]] = collections.defaultdict(list)
    key = (path, *file_stamp(path))
    with _known_files_lock:
      known = known_files.get(key)
    if known is None:
      known = self._describe()
      with _known_files_lock:
        known_files[key] = known
        if len(known_files) > _NUM_KNOWN:
          del known_files[next(iter(known_files))]
    self._timeline, (height, width) = known
    num_frames, seconds = self._timeline.num_frames, self._timeline.seconds
    self.info = VideoInfo(num_frames, float(num_frames / seconds), float(seconds), height, width)

  def close(self) -> None:
    """Closes the file and all its decoders."""
    for decoder in itertools.chain.from_iterable(self._idle.values()):
      decoder.close()
    self._idle.clear()

  def __del__(self):
    self.close()  # at once, even if an error or a caller still knows a decoder

  @property
  def num_decoded(self) -> int:
    """Number of frames decoded so far, wanted or not: the cost of reading."""
    return sum(d.num_decoded for d in itertools.chain.from_iterable(self._idle.values()))

  def _describe(self) -> tuple[Timeline, tuple[int, int]]:
    """Returns the timeline, and (height, width) of the first frame."""
    decoder = VideoDecoder(self.path, self._num_threads)
    try:
      (frame,) = decoder.read([0])
    except Exception:
      decoder.close()  # the error refers to the decoder, and may be kept for long
      raise
    self._idle[self._num_threads].append(decoder)
    return decoder.timeline, frame.shape[:2]

  def _frames(self, indices, image_size):
    segments = list(self._timeline.segments(indices))
    if image_size is None or self._num_threads == 1:
      for index, frame in zip(indices, self._decode_all(segments), strict=True):
        yield self._fit(index, frame, image_size)
    elif len(segments) <= 1:  # frames are resized while the next ones are decoded
      decoded = zip(indices, self._decode_all(segments), strict=True)
      resizes = (functools.partial(self._fit, index, frame, image_size) for index, frame in decoded)
      yield from _in_order(resizes, num_threads=1)
    else:
      stop = threading.Event()
      reads = (
        functools.partial(self._read_segment, segment, image_size, stop) for segment in segments
      )
      results = _in_order(reads, num_threads=min(self._num_threads, len(segments)))
      try:
        for frames in results:
          yield from frames
      finally:
        stop.set()
        results.close()

  def _decode_all(self, segments: list[list[int]]) -> Iterator[np.ndarray]:
    """Yields the frames of all segments, from one decoder."""
    with self._decoder(self._num_threads) as decoder:
      for number, segment in enumerate(segments, start=1):
        yield from decoder.read(segment, is_jump_next=number < len(segments))

  def _read_segment(
    self, segment: list[int], image_size: _ImageSize, stop: threading.Event
  ) -> list[np.ndarray]:
    """Returns the resized frames of one segment, from a decoder that no other thread uses.

    Returns fewer of them after `stop` is set: nobody waits for them any more.
    """
    fitted = []
    with self._decoder(num_threads=1) as decoder:
      frames = decoder.read(segment, is_jump_next=True)
      for index, frame in zip(segment, frames, strict=True):
        fitted.append(self._fit(index, frame, image_size))
        if stop.is_set():
          break
    return fitted

  @contextlib.contextmanager
  def _decoder(self, num_threads: int) -> Iterator[VideoDecoder]:
    """Lends an idle decoder, or a new one if all are in use."""
    idle = self._idle[num_threads]
    decoder = idle.pop() if idle else VideoDecoder(self.path, num_threads, self._timeline)
    try:
      yield decoder
    finally:
      idle.append(decoder)
      if decoder.damaged and not self.damaged:
        self.damaged = True
        if self._logs_damage:
          _logger.warning(
            "%s is damaged: some frames are repaired, or replaced by later ones",
            one_line(self.path),
          )


def _in_order(tasks: Iterable[Callable[[], _Result]], num_threads: int) -> Generator[_Result]:
  """Yields the results of tasks in their order, and runs a few tasks ahead.

  Not all tasks run ahead, because the caller may be slow.
  """
  pool, started = ThreadPoolExecutor(num_threads), collections.deque()
  try:
    for task in tasks:
      started.append(pool.submit(task))
      if len(started) > num_threads + 1:
        yield started.popleft().result()
    while started:
      yield started.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
