"""Reads chosen frames of a video without decoding all the others.

A file is first walked once without decoding. That gives the time stamp of every frame, hence the
presentation order, and the key frames, at which decoding can start. The frames asked for are then
cut into runs between jumps. Of frames that are resized, several runs are decoded at a time, each
by a decoder of its own; otherwise one decoder, of several threads, does one run after the other.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import av
import numpy as np

from videochat_flash_jax.data.media.files import check_regular, file_stamp, is_address
from videochat_flash_jax.data.media.picture_folder import list_pictures, read_picture
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_decoder import VideoDecoder
from videochat_flash_jax.data.media.video_timeline import Timeline
from videochat_flash_jax.errors import InputError, one_line

_logger = logging.getLogger("videochat_flash_jax")
_MAX_THREADS = 4  # each holds frames of its own
_NUM_KNOWN = 4  # some megabytes each, of an hour of video
# Timelines and (height, width) of the files opened last, for several questions about one film;
# size and time of a file tell it from one that was there before.
known_files: dict[tuple[Path, int, int], tuple[Timeline, tuple[int, int]]] = {}
_known_files_lock = threading.Lock()
_Result = TypeVar("_Result")
_ImageSize = int | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What a video is: seconds = num_frames / fps, and the size in pixels as it is shown."""

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
    path: the file or folder.
    picture_fps: pictures shown a second, of a folder.
    num_threads: threads that decode; by default up to four, one a core. Give 1 where several
      processes read at once.
    logs_damage: says once when frames turn out to be damaged, in the log.

  Raises:
    InputError: there is no such file, it is a pipe or a playlist, or no frame can be read from it.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise InputError(f"{path!r} is no path of a video; give a video file or a folder of pictures")
  if is_address(path):
    return _VideoFile(str(path), num_threads, logs_damage)
  path = Path(path)
  if os.path.isdir(path):  # unlike Path's own, it takes a path that is too long, too
    return _PictureFolder(path, picture_fps)
  if not os.path.exists(path):
    raise InputError(f"{path}: there is no such video file or folder; check the path")
  check_regular(path)
  if path.stat().st_size == 0:
    raise InputError(f"{path}: the file is empty; copy or download it again")
  return _VideoFile(path, num_threads, logs_damage)


class VideoReader:
  """A video of which any frame can be asked for; frame i is the i-th one shown, from 0."""

  path: Path
  info: VideoInfo
  damaged = False  # whether a frame read so far was patched up, or a later one stood in for it

  def read(
    self, indices: Sequence[int] | np.ndarray, image_size: int | tuple[int, int] | None = None
  ) -> np.ndarray:
    """Returns the frames `indices`, in this order, as uint8 `[F, H, W, 3]`; see `frames`."""
    return np.stack(list(self.frames(indices, image_size)))

  def frames(
    self, indices: Iterable[int], image_size: int | tuple[int, int] | None = None
  ) -> Iterator[np.ndarray]:
    """Yields the frames `indices` one by one, as they are decoded, each uint8 `[H, W, 3]`.

    Any order is right and a frame may be asked for repeatedly; rising indices are fast.

    Args:
      indices: frame numbers.
      image_size: each frame is resized at once to this square, or (height, width), so that no
        more than one frame of the video's own size is held by each thread.

    Raises:
      InputError: the file ends early or cannot be decoded, or its frames differ in size and no
        `image_size` is given.
      IndexError: there is no such frame.
    """
    indices = [int(index) for index in indices]
    for index in indices:
      if not 0 <= index < self.info.num_frames:
        raise IndexError(f"{self.path}: frame {index} of {self.info.num_frames}")
    repeats = [(index, len(list(same))) for index, same in itertools.groupby(indices)]
    frames = self._frames([index for index, _ in repeats], image_size)
    for (_, count), frame in zip(repeats, frames, strict=True):
      yield from itertools.repeat(frame, count)

  def close(self) -> None:
    """Releases the file."""

  def _frames(self, indices: list[int], image_size: _ImageSize) -> Iterator[np.ndarray]:
    """`frames`, of numbers that exist and of which no two neighbours are equal."""
    raise NotImplementedError

  def _fit(self, index: int, frame: np.ndarray, image_size: _ImageSize) -> np.ndarray:
    """Resizes a frame, or sees to it that it is as large as the others."""
    if image_size is not None:
      return resize(frame, image_size)
    if frame.shape[:2] != (self.info.height, self.info.width):
      raise InputError(
        f"{self.path}: frame {index} is {frame.shape[1]}x{frame.shape[0]}, the first one is "
        f"{self.info.width}x{self.info.height}; give an image size, or frames of one size"
      )
    return frame

  def __enter__(self) -> "VideoReader":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


class _PictureFolder(VideoReader):
  """A folder of pictures, in natural order."""

  def __init__(self, path: Path, fps: float):
    self.path = path
    self._pictures = list_pictures(path)
    if fps <= 0:
      raise InputError(f"{path}: {fps:g} pictures a second; give a rate above 0")
    num_frames = len(self._pictures)
    height, width = read_picture(self._pictures[0]).shape[:2]
    self.info = VideoInfo(num_frames, fps, num_frames / fps, height, width)

  def _frames(self, indices, image_size):
    for index in indices:
      yield self._fit(index, read_picture(self._pictures[index]), image_size)


class _VideoFile(VideoReader):
  """A file that FFmpeg can decode."""

  def __init__(self, path: str | Path, num_threads: int | None, logs_damage: bool):
    self.path, self._logs_damage = path, logs_damage
    self._num_threads = num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
    self._idle: dict[int, list[VideoDecoder]] = collections.defaultdict(list)  # by their threads
    state = (path, *file_stamp(path))
    with _known_files_lock:
      known = known_files.get(state)
    if known is None:
      known = self._describe()
      with _known_files_lock:
        known_files[state] = known
        if len(known_files) > _NUM_KNOWN:
          del known_files[next(iter(known_files))]
    self._timeline, (height, width) = known
    num_frames, seconds = self._timeline.num_frames, self._timeline.seconds
    self.info = VideoInfo(num_frames, float(num_frames / seconds), float(seconds), height, width)

  def close(self) -> None:
    for decoder in itertools.chain.from_iterable(self._idle.values()):
      decoder.close()
    self._idle.clear()

  @property
  def num_decoded(self) -> int:
    """Frames decoded so far, wanted or not: what reading has cost."""
    return sum(d.num_decoded for d in itertools.chain.from_iterable(self._idle.values()))

  def _describe(self) -> tuple[Timeline, tuple[int, int]]:
    """The timeline, and (height, width) of the first frame."""
    with _named_errors(self.path):
      decoder = VideoDecoder(self.path, self._num_threads)
      try:
        (frame,) = decoder.read([0])
      except Exception:
        decoder.close()  # the error may be kept, and with it the decoder
        raise
    self._idle[self._num_threads].append(decoder)
    return decoder.timeline, frame.shape[:2]

  def _frames(self, indices, image_size):
    runs = list(self._timeline.runs(indices))
    if image_size is None or self._num_threads == 1:
      for index, frame in zip(indices, self._decoded(runs), strict=True):
        yield self._fit(index, frame, image_size)
    elif len(runs) == 1:  # pictures are resized while the next ones are decoded
      decoded = zip(indices, self._decoded(runs), strict=True)
      resizes = (functools.partial(self._fit, index, frame, image_size) for index, frame in decoded)
      yield from _in_order(resizes, num_threads=1)
    else:
      reads = (functools.partial(self._read_run, run, image_size) for run in runs)
      for frames in _in_order(reads, num_threads=min(self._num_threads, len(runs))):
        yield from frames

  def _decoded(self, runs: list[list[int]]) -> Iterator[np.ndarray]:
    """The frames of all runs, from one decoder."""
    with self._decoder(self._num_threads) as decoder:
      for number, run in enumerate(runs, start=1):
        yield from decoder.read(run, is_jump_next=number < len(runs))

  def _read_run(self, run: list[int], image_size: _ImageSize) -> list[np.ndarray]:
    """The resized frames of one run, from a decoder that no one else uses meanwhile."""
    with self._decoder(num_threads=1) as decoder:
      frames = decoder.read(run, is_jump_next=True)
      return [self._fit(index, frame, image_size) for index, frame in zip(run, frames, strict=True)]

  @contextlib.contextmanager
  def _decoder(self, num_threads: int) -> Iterator[VideoDecoder]:
    """Lends an idle decoder, or a new one."""
    idle = self._idle[num_threads]
    with _named_errors(self.path):
      decoder = idle.pop() if idle else VideoDecoder(self.path, num_threads, self._timeline)
    try:
      yield decoder
    finally:
      idle.append(decoder)
      if decoder.damaged and not self.damaged:
        self.damaged = True
        if self._logs_damage:
          _logger.warning(
            "%s is damaged: some frames are patched up, or later ones stand in for them",
            one_line(self.path),
          )


def _in_order(tasks: Iterable[Callable[[], _Result]], num_threads: int) -> Iterator[_Result]:
  """Yields what tasks return, of which a few are done ahead: not all, the caller may be slow."""
  pool, coming = ThreadPoolExecutor(num_threads), collections.deque()
  try:
    for task in tasks:
      coming.append(pool.submit(task))
      if len(coming) > num_threads + 1:
        yield coming.popleft().result()
    while coming:
      yield coming.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except av.FFmpegError as error:
    raise InputError(
      f"{path}: not a video, or one cut short before its index ({error.strerror}); "
      "copy it again or re-encode it, e.g. as H.264 mp4"
    ) from error
