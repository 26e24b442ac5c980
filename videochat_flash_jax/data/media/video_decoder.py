"""Decodes chosen frames of one video file, and as few others as possible.

A frame is reached by decoding forward from the frame decoded last. If there is a key frame in
between, the decoder jumps (seeks) to the key frame first. On the way, frames from which no other
frame is predicted are skipped.
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

# A title that is not UTF-8 must not be an error; from PyAV 19 on it never is.
_LENIENT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Formats that only name other files or senders are rejected: a playlist may name any file or
# server, and may never end.
_REFUSED_FORMATS = {
  "concat", "dash", "ffmetadata", "hls", "image2", "image2pipe", "imf", "lavfi", "rtp", "rtsp",
  "sap", "sdp", "tty", "vobsub", "webm_dash_manifest",
}  # fmt: skip
_OPTIONS = {
  "format_whitelist": ",".join(sorted(av.formats_available - _REFUSED_FORMATS)),
  "protocol_whitelist": "file",
}

# Codecs for which FFmpeg can skip the frames from which no other frame at all is predicted. H.264
# marks them in every frame (nal_ref_idc). HEVC marks them only among the frames of one temporal
# layer.
_CODECS_THAT_SKIP = {"h264"}


class VideoDecoder:
  """One open video file and its decoder; only one thread may use it at a time."""

  def __init__(self, path: Path, num_threads: int, timeline: Timeline | None = None):
    """Opens a file.

    Args:
      path: the file, or its address.
      num_threads: threads of the decoder. Each of them holds whole frames.
      timeline: the timeline of the file, if it was read before.
    """
    self._path, self._num_threads = path, num_threads
    self.damaged = False  # whether a frame was repaired, or replaced an unreadable one
    self.num_decoded = 0  # frames that were decoded, wanted or not
    self._to_rgb = VideoReformatter()  # kept for all frames: each new one prepares tables first
    try:
      self._open()
      self.timeline = timeline or read_timeline(self._container, self._stream, path)
    except Exception:
      if hasattr(self, "_container"):
        self._container.close()  # the error refers to it, and may be kept for long
      raise
    self._last_index = -1  # of the frame decoded last
    self._last_frame: av.VideoFrame | None = None
    # The frames that follow, as (index, frame). None: jump before the next frame is read.
    self._next_frames: Iterator[tuple[int, av.VideoFrame]] | None = None
    self._targets: frozenset[int] = frozenset()  # time stamps of the wanted frames
    self._last_target: int | None = None
    self._sent: set[int] = set()  # targets whose packets the decoder got since the last jump
    self._is_jump_next = self._may_skip = False

  def close(self) -> None:
    """Closes the file, and frees the frames that were decoded from it."""
    self._container.close()
    # The iterator and this object refer to each other: without this line, both would stay in memory
    # until the garbage collector finds them.
    self._next_frames = self._last_frame = None

  def read(self, segment: Sequence[int], is_jump_next: bool = False) -> Iterator[np.ndarray]:
    """Decodes frames one by one: uint8 `[H, W, 3]`.

    Args:
      segment: indices of the frames, rising.
      is_jump_next: whether a jump follows. If so, frames after this segment need not be decoded.

    Raises:
      InputError: the file ends before these frames, or has become unreadable.
    """
    stamps = self.timeline.stamps
    self._targets = frozenset(stamps[index] for index in segment) if stamps else frozenset()
    self._last_target = stamps[segment[-1]] if stamps else None
    self._is_jump_next = is_jump_next
    self._sent.clear()
    is_complete = False
    try:
      for index in segment:
        frame = self._find(index)
        self.damaged |= frame.is_corrupt
        pixels = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
        yield np.rot90(pixels, round(frame.rotation / 90))  # both count counterclockwise
      is_complete = not is_jump_next
    except av.FFmpegError as error:
      raise InputError(
        f"{self._path}: frame {index} cannot be decoded ({error.strerror}); "
        "copy the file again or re-encode it, e.g. as H.264 mp4"
      ) from error
    finally:
      if not is_complete:  # frames after the last one yielded may be skipped or missing
        self._next_frames = None

  def _open(self) -> None:
    """Opens the file, and chooses its first video stream."""
    # With "file:", a colon in the name is not taken for the end of a protocol.
    source = open_media(self._path) if is_address(self._path) else f"file:{self._path}"
    try:
      self._container = av.open(source, options=_OPTIONS, **_LENIENT)
    except av.error.ArgumentError as error:  # FFmpeg's error for a format that is not in the list
      raise InputError(
        f"{self._path}: a playlist or a text, or another format that cannot be read; give a video, "
        "e.g. as H.264 mp4"
      ) from error
    except av.error.EOFError as error:
      raise without_frames(self._path) from error
    if not self._container.streams:
      raise without_frames(self._path)
    # The cover picture of an audio file is a video stream, too.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in self._container.streams.video if not s.disposition & cover]
    if not streams:
      raise InputError(f"{self._path}: the file has no video stream (audio only?); give a video")
    self._stream = streams[0]
    self._codec = self._stream.codec_context
    if self._codec is None:  # FFmpeg has no decoder for this codec
      raise InputError(
        f"{self._path}: the codec of its video is not supported; re-encode it as H.264 mp4"
      )
    self._codec.thread_type = "AUTO"
    # With several threads, the decoder of apng cannot continue after it has reached the end.
    self._codec.thread_count = 1 if self._codec.name == "apng" else self._num_threads

  def _find(self, index: int) -> av.VideoFrame:
    """Returns the frame `index`; if it is unreadable, the next readable frame."""
    if self._last_frame is not None and index == self._last_index:
      return self._last_frame
    key = self.timeline.key_before(index)
    is_ahead = self._last_index < index and self.timeline.key_frames[key] <= self._last_index + 1
    if self._next_frames is None or not is_ahead:
      self._start(key)
    if self._advance(index) and self._last_index == index:
      return self._last_frame
    # Not every frame can be decoded right after a jump: with intra-refresh, a key frame is split
    # over many frames. A frame that is missing even when decoding starts two key frames earlier is
    # also missing when everything is decoded.
    self._start(max(0, key - 2))
    if not self._advance(index, skips_none=True):
      raise truncated(self._path, self._last_index + 1, self.timeline.num_frames)
    self.damaged |= self._last_index != index
    return self._last_frame

  def _advance(self, index: int, skips_none: bool = False) -> bool:
    """Decodes up to a frame, or the next one if it is missing; returns whether one was found.

    Args:
      index: index of the frame.
      skips_none: decodes every frame on the way.
    """
    can_skip = self._codec.name in _CODECS_THAT_SKIP and self._last_target is not None
    self._may_skip = can_skip and not skips_none
    for frame_index, frame in self._next_frames:
      self._last_index, self._last_frame = frame_index, frame
      if frame_index >= index:
        return True
    self._next_frames = None
    return False

  def _start(self, key: int) -> None:
    """Jumps, so that decoding continues at the `key`-th key frame, or at a frame before it."""
    self._last_index, self._last_frame = -1, None
    self._sent.clear()
    self._next_frames = self._decode(self._packets_from(key))

  def _packets_from(self, key: int) -> Iterable[av.Packet]:
    """Returns packets, the first of which is the `key`-th key frame or a key frame before it.

    If the file cannot seek there, it is opened again, and its packets are read from the start.
    """
    step = 1
    while self.timeline.stamps:
      wanted = self.timeline.stamps[self.timeline.key_frames[key]]
      try:
        self._container.seek(wanted, stream=self._stream)
      except av.FFmpegError:  # the format cannot seek, such as gif
        break
      packets = self._container.demux(self._stream)
      first = next((packet for packet in packets if packet.is_keyframe), None)
      if first and first.pts is not None and first.pts <= wanted:
        return itertools.chain([first], packets)
      if key == 0:
        break
      key, step = max(0, key - step), 2 * step  # some formats jump too far
    self._container.close()
    self._open()
    return self._container.demux(self._stream)

  def _decode(self, packets: Iterable[av.Packet]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame index, frame) in presentation order, at least up to the end of the segment."""
    number_of_stamp = self.timeline.number_of_stamp
    count = itertools.count()
    for packet in packets:
      stamp = packet.pts
      # After the end of the segment no frame is skipped, so that the next one can continue there.
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
      # The packet of the last target may come before packets of B-frames that are shown earlier.
      is_all_sent = is_target and len(self._sent) == len(self._targets)
      is_end = self._may_skip and self._is_jump_next and is_all_sent
      try:
        frames = packet.decode()
        if is_end:
          frames += self._codec.decode(None)
      except av.error.InvalidDataError:
        continue  # the frame is missing; `_find` notices this if the frame is wanted
      self.num_decoded += len(frames)
      for frame in frames:
        number = number_of_stamp.get(frame.pts) if number_of_stamp else next(count)
        if number is not None:
          yield number, frame
      if is_end:
        return
