"""Where frames come from: a video, pictures, or an iterator whose end nobody knows.

`open_source` makes the right kind of source from what a user gives.
"""

import contextlib
import inspect
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue

import numpy as np
from PIL import Image

from videochat_flash_jax.data.media.ahead import Ahead
from videochat_flash_jax.data.media.files import is_address
from videochat_flash_jax.data.media.frame_choice import FrameChoice
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES, whole_clips
from videochat_flash_jax.data.media.image_reader import ImageSource, read_image
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import VideoInfo, VideoReader
from videochat_flash_jax.errors import InputError, one_line

_logger = logging.getLogger("videochat_flash_jax")
_MOST_FRAMES = 2.0**53  # beyond it floats skip integers
_GLANCE_SECONDS = 0.05  # how often a thread that waits for a queue looks whether it should leave


class FrameSource:
  """Frames to watch, in whole clips, one at a time.

  The last frame is repeated to fill its clip. Use it in a `with` block, or close it.

  Attributes:
    name: what is watched, for messages and a progress bar: "match.mp4", "pictures", "frames".
    num_frames: how many frames are given, a multiple of four; None until an iterator has ended.
    num_seen: how many different frames are among them; of an iterator, so far.
    times: the second at which each frame is shown; of an iterator, of the frames given so far.
    seconds: length of what is watched; of an iterator, of the frames given so far.
    path: of the video or the folder; None for other sources.
    indices: of the given frames in the video, the folder, the list or the array, int64 [T]; None
      for an iterator. A feature store finds features by `path` and `indices`.
    info: of the video, or of a folder that is read as one; None for other sources.
    damaged: whether a frame given so far was repaired, or replaced by another one.
  """

  name: str
  num_frames: int | None = None
  num_seen: int = 0
  times: list[float]
  seconds: float = 0.0
  path: str | Path | None = None
  indices: np.ndarray | None = None
  info: VideoInfo | None = None
  damaged: bool = False

  def frames(self, image_size: int) -> Iterator[np.ndarray]:
    """Yields the frames, resized to squares uint8 [S, S, 3]; none is kept here.

    Args:
      image_size: S, in pixels.

    Raises:
      InputError: a frame cannot be read. All frames before it were yielded.
    """
    raise NotImplementedError

  def look_again(self, numbers: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    """Reads some of the given frames once more; the source may be closed.

    Args:
      numbers: rising indices of the frames, among those that were given.
      image_size: see `frames`.

    Raises:
      InputError: they are not kept anywhere, or cannot be read any more.
    """
    raise InputError(
      "the frames of arrays, lists and iterators are not kept; show those that were given, or "
      "watch a file"
    )

  def close(self) -> None:
    """Closes the video. The iterator of a user is left as it is."""

  def _choose(self, choice: FrameChoice) -> None:
    """Tells which frames are given, where that is known in advance."""
    self.indices, self.seconds = choice.indices, float(choice.seconds)
    self.times = choice.frame_seconds.tolist()
    self.num_frames, self.num_seen = len(self.indices), len(np.unique(self.indices))

  def __enter__(self) -> "FrameSource":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def file_name(path: str | Path) -> str:
  """The last part of a path or an address, to be shown."""
  path = str(path).partition("?")[0] if is_address(path) else str(path)
  return one_line(path.rstrip("/").rpartition("/")[-1])


class VideoSource(FrameSource):
  """A video file, or a folder that is read as one, of which chosen frames are decoded."""

  def __init__(
    self,
    path: str | Path,
    open_reader: Callable[[], VideoReader],
    choose: Callable[[VideoInfo], FrameChoice],
    known_info: Callable[[str | Path], VideoInfo | None] | None = None,
  ):
    """Opens the video, unless its info is known.

    Args:
      path: of the video.
      open_reader: opens it; is not called before a frame is wanted if `known_info` knows the video.
      choose: returns the frames to watch.
      known_info: what is known about a path, such as `FeatureStore.video_info`.
    """
    self.path, self.name = path, file_name(path)
    self._open_reader, self._reader = open_reader, None
    self.info = known_info(path) if known_info else None
    if self.info is None:
      self.info = self._opened().info
    try:
      self._choose(choose(self.info))
    except Exception:
      self.close()
      raise

  @property
  def damaged(self) -> bool:
    """See `FrameSource`; False where features take the place of the frames."""
    return self._reader is not None and self._reader.damaged

  def frames(self, image_size: int) -> Iterator[np.ndarray]:
    return self._opened().frames(self.indices, image_size)

  def look_again(self, numbers: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    with self._open_reader() as reader:
      yield from reader.frames(self.indices[numbers], image_size)

  def close(self) -> None:
    if self._reader is not None:
      self._reader.close()

  def _opened(self) -> VideoReader:
    if self._reader is None:
      self._reader = self._open_reader()
    return self._reader


class PictureSource(FrameSource):
  """Pictures that are there: an array [F, H, W, 3], or a list of images and paths of images."""

  def __init__(
    self,
    pictures: np.ndarray | Sequence[ImageSource],
    name: str,
    choice: FrameChoice,
    path: str | Path | None = None,
  ):
    """Reads nothing yet; `path` is of the folder that the pictures are in, if they are in one."""
    self.name, self.path, self._pictures = name, path, pictures
    self._choose(choice)

  def frames(self, image_size: int) -> Iterator[np.ndarray]:
    for index, same in itertools.groupby(self.indices.tolist()):
      frame = resize(_read_frame(self._pictures[index], index), image_size)
      yield from (frame for _ in same)

  def look_again(self, numbers: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    for index in self.indices[numbers].tolist():
      yield resize(_read_frame(self._pictures[index], index), image_size)


class QueueFrames(Iterator[ImageSource]):
  """What a queue gives, until None. A thread that waits for a frame here can be told to leave."""

  def __init__(self, queue: Queue):
    self._queue, self._is_left = queue, threading.Event()

  def __next__(self) -> ImageSource:
    while not self._is_left.is_set():
      with contextlib.suppress(Empty):
        frame = self._queue.get(timeout=_GLANCE_SECONDS)
        if frame is None:
          break
        return frame
    raise StopIteration

  def leave(self) -> None:
    """Takes nothing more: what is put from now on is for the next reader."""
    self._is_left.set()


class IteratorSource(FrameSource):
  """An iterator of frames, such as a camera: frame i is shown at i / fps seconds.

  Frames are taken one at a time, and not one more than are given or skipped. So the same iterator
  can be watched again, and goes on.
  """

  def __init__(
    self,
    frames: Iterable[ImageSource],
    name: str,
    max_frames: int,
    *,
    fps: float = 1.0,
    start: float = 0.0,
    end: float | None = None,
    stall_seconds: float | None = None,
    warns: bool = False,
  ):
    """Takes no frame yet.

    Args:
      frames: images of one size.
      name: for messages.
      max_frames: the most frames to take, rounded down as by `whole_clips`; the iterator is left
        there, whether it has more or not.
      fps: frames a second.
      start: frames that are not shown any more at this second are skipped.
      end: the frames shown from this second on are not taken.
      stall_seconds: the most seconds to wait for a frame; None to wait forever. If it is given, a
        thread takes and resizes the frames, one or two of them ahead.
      warns: whether to log that the iterator was left at `max_frames`.
    """
    self.name, self.times = name, []
    self._frames, self._fps, self._stall_seconds = frames, fps, stall_seconds
    self._max_frames, self._warns = whole_clips(max_frames), warns
    self._first = math.floor(_rounded(start * fps))
    last = _MOST_FRAMES if end is None else _rounded(end * fps)
    self._stop = min(math.ceil(last), self._first + self._max_frames)

  def frames(self, image_size: int) -> Iterator[np.ndarray]:
    last, frames = None, self._resized(image_size)
    if self._stall_seconds is not None:
      frames = Ahead(frames, size=1, patience=self._stall_seconds)
    with contextlib.closing(frames):
      for number in itertools.count():
        try:
          frame = next(frames)
        except StopIteration:
          break
        except TimeoutError as error:
          self.close()
          raise _missing(number, error) from error
        if frame is None:
          continue
        last = frame
        self.num_seen += 1
        self.times.append(number / self._fps)
        self.seconds = self.num_seen / self._fps
        yield frame
    if last is None:
      raise InputError(
        f"{self.name}: the iterator ended before a frame was watched; give an earlier start, or an "
        "iterator with frames"
      )
    for _ in range(-self.num_seen % CLIP_FRAMES):
      self.times.append(self.times[-1])
      yield last
    self.num_frames = len(self.times)
    if self._warns and self.num_seen == self._max_frames:
      _logger.warning(
        "%s: watched %d frames, the model's own bound, and no more; max_frames sets another bound",
        self.name,
        self.num_seen,
      )

  def close(self) -> None:
    """Leaves a queue. Any other iterator is left as it is."""
    if isinstance(self._frames, QueueFrames):
      self._frames.leave()

  def _resized(self, image_size: int) -> Iterator[np.ndarray | None]:
    """Takes frames from the iterator, resizes them at once, and yields None for skipped ones.

    A camera may write its next frame into the same array.
    """
    frames, size = iter(self._frames), None
    if inspect.isgenerator(frames) and frames.gi_running:
      raise InputError(
        f"{self.name}: the iterator still makes a frame for which an earlier call did not wait; "
        "try again later (that frame is lost), or give a queue, which loses none"
      )
    for number in range(self._stop):
      try:
        frame = next(frames)
      except StopIteration:
        return
      except Exception as error:
        raise _missing(number, error) from error
      if number < self._first:
        yield None
        continue
      frame = _read_frame(frame, number)
      size = size or frame.shape
      if frame.shape != size:
        raise InputError(
          f"frame {number} is {frame.shape[1]}x{frame.shape[0]}, those before are "
          f"{size[1]}x{size[0]}; give frames of one size"
        )
      yield resize(frame, image_size)


def _missing(number: int, error: Exception) -> InputError:
  """The error of a frame that the iterator does not give."""
  reason = f"{type(error).__name__}: {error!s:.100}"
  return InputError(f"frame {number} did not come ({reason}); check what the iterator reads")


def _rounded(number: float) -> float:
  """A time in frames without the error of a product of floats: 0.57 s * 100 fps is 57."""
  return round(min(number, _MOST_FRAMES), 6)


def _read_frame(frame: ImageSource, number: int) -> np.ndarray:
  """Reads one frame as uint8 [H, W, 3]; `number` is for messages."""
  if is_array(frame):
    frame = np.asarray(frame)
  if not isinstance(frame, ImageSource):
    raise InputError(
      f"frame {number} is of type {type(frame).__name__}; give uint8 [height, width, 3], a Pillow "
      "image or a path"
    )
  try:
    return read_image(frame)
  except InputError as error:
    raise InputError(f"frame {number}: {error}") from error


def is_array(value: object) -> bool:
  """Whether a value is an array of NumPy, JAX or torch."""
  return hasattr(value, "__array__") and not isinstance(value, Image.Image)
