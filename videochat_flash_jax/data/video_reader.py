"""Reads chosen frames of a video without decoding all the others.

A file is first walked once without decoding. That gives the time stamp of every frame, hence the
presentation order, and the key frames, at which decoding can start. A frame is then reached by
decoding forward from the last one, unless a key frame lies in between: then by a jump to it.
For rising frame numbers, no stretch between key frames is decoded twice, or without need.

  with open_video("match.mp4") as video:
    frames = video.read([0, 30, 60], image_size=224)  # uint8 [3, 224, 224, 3]
"""

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from videochat_flash_jax.data.preprocessing import resize
from videochat_flash_jax.data.video_timeline import read_timeline, truncated
from videochat_flash_jax.errors import InputError

_logger = logging.getLogger("videochat_flash_jax")
_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
# A title that is not UTF-8 must not stop us; from PyAV 19 on it never does.
_LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What a video is: seconds = num_frames / fps, and the size in pixels as it is shown."""

  num_frames: int
  fps: float
  seconds: float
  height: int
  width: int


def open_video(path: str | Path, picture_fps: float = 1.0) -> "VideoReader":
  """Opens a video file, or a folder of numbered pictures shown at `picture_fps`.

  Raises:
    InputError: there is no such file, or no frame can be read from it.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise InputError(f"{path!r} is no path of a video; give a video file or a folder of pictures")
  if re.match(r"\w+://", str(path)):
    raise InputError(f"{path}: an address, not a file; download the video first")
  path = Path(path)
  if os.path.isdir(path):  # unlike Path's own, it takes a path that is too long, too
    return _PictureFolder(path, picture_fps)
  if not os.path.exists(path):
    raise InputError(f"{path}: there is no such video file or folder; check the path")
  if path.stat().st_size == 0:
    raise InputError(f"{path}: the file is empty; copy or download it again")
  return _VideoFile(path)


class VideoReader:
  """A video of which any frame can be asked for; frame i is the i-th one shown, from 0."""

  path: Path
  info: VideoInfo

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
        more than one frame of the video's own size is held.

    Raises:
      InputError: the file ends early or cannot be decoded, or its frames differ in size and no
        `image_size` is given.
      IndexError: there is no such frame.
    """
    size = (self.info.height, self.info.width)
    last_index = None
    for index in map(int, indices):
      if not 0 <= index < self.info.num_frames:
        raise IndexError(f"{self.path}: frame {index} of {self.info.num_frames}")
      if index != last_index:
        frame, last_index = self._frame(index), index
        if image_size is not None:
          frame = resize(frame, image_size)
        elif frame.shape[:2] != size:
          raise InputError(
            f"{self.path}: frame {index} is {frame.shape[1]}x{frame.shape[0]}, the first one is "
            f"{size[1]}x{size[0]}; give an image size, or frames of one size"
          )
      yield frame

  def close(self) -> None:
    """Releases the file."""

  def _frame(self, index: int) -> np.ndarray:
    """Decodes one frame: uint8 `[H, W, 3]`."""
    raise NotImplementedError

  def __enter__(self) -> "VideoReader":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


class _PictureFolder(VideoReader):
  """A folder of pictures whose names sort naturally: 2.jpg before 10.jpg."""

  def __init__(self, path: Path, fps: float):
    self.path = path
    try:
      files = list(path.iterdir())
    except OSError as error:
      raise InputError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    self._pictures = sorted(
      (file for file in files if file.suffix.lower() in _PICTURE_SUFFIXES),
      key=lambda file: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)
      ],
    )
    if not self._pictures:
      raise InputError(f"{path}: the folder has no .jpg or .png; give one of numbered pictures")
    if fps <= 0:
      raise InputError(f"{path}: {fps:g} pictures a second; give a rate above 0")
    num_frames = len(self._pictures)
    height, width = self._frame(0).shape[:2]
    self.info = VideoInfo(num_frames, fps, num_frames / fps, height, width)

  def _frame(self, index: int) -> np.ndarray:
    file = self._pictures[index]
    try:
      with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
    except OSError as error:  # Pillow's own error for "no picture" is one, too
      raise InputError(f"{file}: not a readable picture; replace or remove it") from error


class _VideoFile(VideoReader):
  """A file that FFmpeg can decode."""

  def __init__(self, path: Path):
    self.path = path
    self._warned = False
    try:
      self._open()
      self._timeline = read_timeline(self._container, self._stream, path)
      self._start_decoding(0)
      height, width = self._decode_frame(0).shape[:2]
    except av.FFmpegError as error:
      raise InputError(
        f"{path}: not a video, or one cut short before its index ({error.strerror}); "
        "copy it again or re-encode it, e.g. as H.264 mp4"
      ) from error
    num_frames, seconds = self._timeline.num_frames, self._timeline.seconds
    self.info = VideoInfo(num_frames, float(num_frames / seconds), float(seconds), height, width)

  def close(self) -> None:
    self._container.close()

  def _open(self) -> None:
    # "file:" keeps a colon in a name from being read as a protocol.
    self._container = av.open(f"file:{self.path}", **_LENIENT)
    if self._container.format.name == "tty":  # FFmpeg would film the text
      raise InputError(f"{self.path}: a text file, not a video; give a video")
    # An audio file's cover picture is a video stream, too.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in self._container.streams.video if not s.disposition & cover]
    if not streams:
      raise InputError(f"{self.path}: the file has no video stream (audio only?); give a video")
    self._stream = streams[0]
    if self._stream.codec_context is None:  # a codec that FFmpeg has no decoder for
      raise InputError(
        f"{self.path}: the codec of its video is not supported; re-encode it as H.264 mp4"
      )
    self._stream.thread_type = "AUTO"
    # Every thread holds whole frames and works ahead, in vain before a jump: a few are best.
    self._stream.codec_context.thread_count = min(4, os.cpu_count() or 1)

  def _start_decoding(self, key_frame: int) -> None:
    """Makes `key_frame` the next frame to be decoded, or one before it."""
    wanted = self._timeline.stamps[key_frame] if key_frame else None
    while key_frame:
      self._container.seek(self._timeline.stamps[key_frame], stream=self._stream)
      packets = self._container.demux(self._stream)
      landing = next((packet for packet in packets if packet.is_keyframe), None)
      if landing and landing.pts <= wanted:
        packets = itertools.chain([landing], packets)
        break
      key_frame = self._timeline.key_frame_before(key_frame - 1)  # some formats land too late
    else:
      self._container.close()
      self._open()
      packets = self._container.demux(self._stream)
    self._position, self._decoded = -1, None
    self._upcoming = self._decode(packets)

  def _decode(self, packets: Iterable[av.Packet]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame) in presentation order."""
    count, damaged = itertools.count(), False
    for packet in packets:
      try:
        frames = packet.decode()
      except av.error.InvalidDataError:
        damaged = True  # the frame after it stands in
        continue
      for frame in frames:
        if damaged and not self._warned:
          _logger.warning("%s is damaged: later frames stand in for unreadable ones", self.path)
          self._warned = True
        stamps = self._timeline.number_of_stamp
        number = stamps.get(frame.pts) if stamps else next(count)
        if number is not None:
          yield number, frame

  def _frame(self, index: int) -> np.ndarray:
    try:
      return self._decode_frame(index)
    except av.FFmpegError as error:
      raise InputError(
        f"{self.path}: frame {index} cannot be decoded ({error.strerror}); "
        "copy the file again or re-encode it, e.g. as H.264 mp4"
      ) from error

  def _decode_frame(self, index: int) -> np.ndarray:
    key_frame = self._timeline.key_frame_before(index)
    if index < self._position or key_frame > self._position + 1:
      self._start_decoding(key_frame)
    while self._position < index:
      try:
        self._position, self._decoded = next(self._upcoming)
      except StopIteration:
        raise truncated(self.path, self._position + 1, self._timeline.num_frames) from None
    picture = self._decoded.to_ndarray(format="rgb24")
    return np.rot90(picture, round(self._decoded.rotation / 90))  # both count counterclockwise
