"""Decodes chosen frames of one video file, and as few others as possible.

A frame is reached by decoding forward from the last one, unless a key frame lies in between:
then by a jump to it. On the way, frames that no other frame is predicted from are left out.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from videochat_flash_jax.data.media.files import is_address, open_media
from videochat_flash_jax.data.media.video_timeline import (
  Timeline,
  read_timeline,
  truncated,
  without_frames,
)
from videochat_flash_jax.errors import InputError

# A title that is not UTF-8 must not stop us; from PyAV 19 on it never does.
_LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# What names other files, or senders, is no video: a playlist may lead anywhere, and never end.
_REFUSED_FORMATS = {
  "concat", "dash", "ffmetadata", "hls", "image2", "image2pipe", "imf", "lavfi", "rtp", "rtsp",
  "sap", "sdp", "tty", "vobsub", "webm_dash_manifest",
}  # fmt: skip
_OPTIONS = {
  "format_whitelist": ",".join(sorted(av.formats_available - _REFUSED_FORMATS)),
  "protocol_whitelist": "file",
}

# Codecs of which FFmpeg can leave out frames that no frame at all is predicted from. H.264 says so
# in every frame (nal_ref_idc). HEVC does so for the frames of one temporal layer only.
_CODECS_THAT_SKIP = {"h264"}


class VideoDecoder:
  """One open file and its decoder; for one thread at a time."""

  def __init__(self, path: Path, num_threads: int, timeline: Timeline | None = None):
    """Opens a file.

    Args:
      path: the file.
      num_threads: threads of the decoder. Every one holds whole frames.
      timeline: the file's, if it was read before.
    """
    self._path, self._num_threads = path, num_threads
    self.damaged = False  # whether a frame was patched up, or stood in for an unreadable one
    self.num_decoded = 0  # frames that came out, wanted or not
    self._to_rgb = VideoReformatter()  # a frame's own would prepare its tables for that frame only
    try:
      self._open()
      self.timeline = timeline or read_timeline(self._container, self._stream, path)
    except Exception:
      if hasattr(self, "_container"):
        self._container.close()  # the error may be kept, and with it the decoder
      raise
    self._position = -1  # the frame decoded last
    self._picture: av.VideoFrame | None = None
    self._upcoming: Iterator[tuple[int, av.VideoFrame]] | None = None  # None: a jump is due
    self._targets: frozenset[int] = frozenset()  # time stamps of the frames asked for
    self._last_target: int | None = None
    self._sent: set[int] = set()  # targets whose packets the decoder has got since its last start
    self._is_jump_next = self._may_skip = False

  def close(self) -> None:
    """Releases the file, and what was decoded of it."""
    self._container.close()
    # What is upcoming knows its decoder: neither would be freed before garbage is collected.
    self._upcoming = self._picture = None

  def read(self, run: Sequence[int], is_jump_next: bool = False) -> Iterator[np.ndarray]:
    """Decodes frames one by one: uint8 `[H, W, 3]`.

    Args:
      run: their numbers, rising.
      is_jump_next: nothing close behind this run will be asked for, and need be decoded.

    Raises:
      InputError: the file ends before these frames, or has become unreadable.
    """
    stamps = self.timeline.stamps
    self._targets = frozenset(stamps[index] for index in run) if stamps else frozenset()
    self._last_target = stamps[run[-1]] if stamps else None
    self._is_jump_next = is_jump_next
    self._sent.clear()
    is_complete = False
    try:
      for index in run:
        picture = self._find(index)
        self.damaged |= picture.is_corrupt
        pixels = self._to_rgb.reformat(picture, format="rgb24").to_ndarray()
        yield np.rot90(pixels, round(picture.rotation / 90))  # both count counterclockwise
      is_complete = not is_jump_next
    except av.FFmpegError as error:
      raise InputError(
        f"{self._path}: frame {index} cannot be decoded ({error.strerror}); "
        "copy the file again or re-encode it, e.g. as H.264 mp4"
      ) from error
    finally:
      if not is_complete:  # frames behind the last one yielded may be left out or cut off
        self._upcoming = None

  def _open(self) -> None:
    # "file:" keeps a colon in a name from being read as a protocol.
    source = open_media(self._path) if is_address(self._path) else f"file:{self._path}"
    try:
      self._container = av.open(source, options=_OPTIONS, **_LENIENT)
    except av.error.ArgumentError as error:  # FFmpeg's word for a format that is not in the list
      raise InputError(
        f"{self._path}: a playlist or a text, or of another format that is not read; give a video, "
        "e.g. as H.264 mp4"
      ) from error
    except av.error.EOFError as error:
      raise without_frames(self._path) from error
    if not self._container.streams:
      raise without_frames(self._path)
    # An audio file's cover picture is a video stream, too.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in self._container.streams.video if not s.disposition & cover]
    if not streams:
      raise InputError(f"{self._path}: the file has no video stream (audio only?); give a video")
    self._stream = streams[0]
    self._codec = self._stream.codec_context
    if self._codec is None:  # a codec that FFmpeg has no decoder for
      raise InputError(
        f"{self._path}: the codec of its video is not supported; re-encode it as H.264 mp4"
      )
    self._codec.thread_type = "AUTO"
    # With several threads, the decoder of apng cannot go on once it has reached an end.
    self._codec.thread_count = 1 if self._codec.name == "apng" else self._num_threads

  def _find(self, index: int) -> av.VideoFrame:
    """The frame `index`; if it is unreadable, the next readable one."""
    if self._picture is not None and index == self._position:
      return self._picture
    key = self.timeline.key_before(index)
    is_ahead = self._position < index and self.timeline.key_frames[key] <= self._position + 1
    if self._upcoming is None or not is_ahead:
      self._start(key)
    if self._advance(index) and self._position == index:
      return self._picture
    # Not every frame can be decoded right after a jump: intra-refresh spreads a key frame over
    # many. What is missing even from two key frames before on, decoding everything lacks, too.
    self._start(max(0, key - 2))
    if not self._advance(index, is_careful=True):
      raise truncated(self._path, self._position + 1, self.timeline.num_frames)
    self.damaged |= self._position != index
    return self._picture

  def _advance(self, index: int, is_careful: bool = False) -> bool:
    """Decodes up to a frame or, where it is missing, the next one; whether there is any.

    Args:
      index: the frame's number.
      is_careful: nothing is left out.
    """
    can_skip = self._codec.name in _CODECS_THAT_SKIP and self._last_target is not None
    self._may_skip = can_skip and not is_careful
    for number, picture in self._upcoming:
      self._position, self._picture = number, picture
      if number >= index:
        return True
    self._upcoming = None
    return False

  def _start(self, key: int) -> None:
    """Makes the `key`-th key frame the next frame to be decoded, or a frame before it."""
    self._position, self._picture = -1, None
    self._sent.clear()
    self._upcoming = self._decode(self._packets_from(key))

  def _packets_from(self, key: int) -> Iterable[av.Packet]:
    step = 1
    while self.timeline.stamps:
      wanted = self.timeline.stamps[self.timeline.key_frames[key]]
      try:
        self._container.seek(wanted, stream=self._stream)
      except av.FFmpegError:  # of a format without jumps, such as gif
        break
      packets = self._container.demux(self._stream)
      landing = next((packet for packet in packets if packet.is_keyframe), None)
      if landing and landing.pts is not None and landing.pts <= wanted:
        return itertools.chain([landing], packets)
      if key == 0:
        break
      key, step = max(0, key - step), 2 * step  # some formats land too late
    self._container.close()
    self._open()
    return self._container.demux(self._stream)

  def _decode(self, packets: Iterable[av.Packet]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame) in presentation order, up to the run's end at least."""
    number_of_stamp = self.timeline.number_of_stamp
    count = itertools.count()
    for packet in packets:
      stamp = packet.pts
      # Behind the run's end nothing is left out, so that the next one may go on from there.
      is_target = stamp in self._targets
      is_unwanted = (
        self._may_skip
        and stamp is not None
        and (stamp < self._last_target or self._is_jump_next)
        and not is_target
      )
      self._codec.skip_frame = "NONREF" if is_unwanted else "DEFAULT"
      if is_target:
        self._sent.add(stamp)
      # The last target's packet may come before those of B-frames that are shown earlier.
      is_all_sent = is_target and len(self._sent) == len(self._targets)
      is_end = self._may_skip and self._is_jump_next and is_all_sent
      try:
        frames = packet.decode()
        if is_end:
          frames += self._codec.decode(None)
      except av.error.InvalidDataError:
        continue  # its frame is missing, which is noticed where it matters
      self.num_decoded += len(frames)
      for frame in frames:
        number = number_of_stamp.get(frame.pts) if number_of_stamp else next(count)
        if number is not None:
          yield number, frame
      if is_end:
        return
