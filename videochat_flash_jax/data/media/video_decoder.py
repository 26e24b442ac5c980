"""Decodes chosen frames of one video file, and as few others as possible.

A frame is reached by decoding forward from the frame decoded last. If there is a key frame in
between, the decoder jumps (seeks) to the key frame first. On the way, frames from which no other
frame is predicted are skipped.
"""

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from videochat_flash_jax.data.media.files import (
  is_address,
  open_media,
  read_start,
  server_failure,
)
from videochat_flash_jax.data.media.video_packets import header_seconds
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

_MOST_FRAMES_LATE = 16  # as many as a codec may reorder
# Display matrices of 0 to 3 quarters of a turn counterclockwise, see `_display_matrix`.
_TURNS = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]


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
    self._container = self._stream = self._codec = self._matrix = None
    self._last_index = -1  # of the frame decoded last
    self._last_frame: av.VideoFrame | None = None
    # The frames that follow, as (index, frame). None: jump before the next frame is read.
    self._next_frames: Iterator[tuple[int, av.VideoFrame]] | None = None
    try:
      with one_error(path):
        self._open()
        self.timeline = timeline or read_timeline(self._container, self._stream, path)
    except InputError:
      self.close()  # the error refers to this object, and may be kept for long
      raise
    self._targets: frozenset[int] = frozenset()  # indices of the wanted frames
    self._last_target = -1
    self._sent: set[int] = set()  # targets whose packets the decoder got since the last jump
    self._is_jump_next = self._may_skip = False

  def close(self) -> None:
    """Closes the file, and frees its decoder and the frames that were decoded."""
    # The iterator and this object refer to each other: without this line, both would stay in memory
    # until the garbage collector finds them.
    self._next_frames = self._last_frame = None
    if self._codec:
      # PyAV frees a decoder while it holds the interpreter's lock, and FFmpeg then waits for the
      # decoder's threads. One that writes to a log of Python waits for the lock: both wait for
      # ever. Flushing waits for the threads, too, but without the lock.
      self._codec.flush_buffers()
    if self._container:
      self._container.close()
    self._container = self._stream = self._codec = None

  def read(self, segment: Sequence[int], is_jump_next: bool = False) -> Iterator[np.ndarray]:
    """Decodes frames one by one: uint8 `[H, W, 3]`.

    Args:
      segment: indices of the frames, rising.
      is_jump_next: whether a jump follows. If so, frames after this segment need not be decoded.

    Raises:
      InputError: the file ends before these frames, or has become unreadable.
    """
    self._targets, self._last_target = frozenset(segment), segment[-1]
    self._is_jump_next = is_jump_next
    self._sent.clear()
    is_complete = False
    try:
      for index in segment:
        with one_error(self._path, f"frame {index} cannot be decoded"):
          frame = self._find(index)
          self.damaged |= frame.is_corrupt
          pixels = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
          self._matrix = self._matrix or _display_matrix(frame)
        yield _as_shown(pixels, self._matrix)
      is_complete = not is_jump_next
    finally:
      if not is_complete:  # frames after the last one yielded may be skipped or missing
        self._next_frames = None

  def _open(self) -> None:
    """Opens the file, and chooses the video stream that is the film."""
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
    self._stream = _choose_film(streams)
    self._codec = self._stream.codec_context
    if self._codec is None:  # FFmpeg has no decoder for this codec
      raise InputError(
        f"{self._path}: the codec of its video is not supported; re-encode it as H.264 mp4"
      )
    if self._container.format.name == "webp_pipe" and _is_animated_webp(self._path):
      raise InputError(
        f"{self._path}: animated WebP cannot be read as a video; convert it to mp4 or gif"
      )
    self._codec.thread_type = "AUTO"
    # With several threads, the decoder of apng cannot continue after it has reached the end.
    self._codec.thread_count = 1 if self._codec.name == "apng" else self._num_threads

  def _find(self, index: int) -> av.VideoFrame:
    """Returns the frame `index`; if it is unreadable, the next readable frame."""
    if self._last_frame is not None and index == self._last_index:
      return self._last_frame
    key = self.timeline.key_before(index)
    is_ahead = (
      self._last_index < index and self.timeline.key_frames[key].frame <= self._last_index + 1
    )
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
    if self._last_index != index and not self._find_late(index):
      self.damaged = True
    return self._last_frame

  def _find_late(self, index: int) -> bool:
    """Looks for a frame among the next ones; returns whether it was found.

    Where stamps are mixed up, a frame is decoded after frames that are shown later.
    """
    for frame_index, frame in itertools.islice(self._next_frames, _MOST_FRAMES_LATE):
      if frame_index == index:
        self._last_index, self._last_frame = frame_index, frame
        return True
    self._next_frames = None  # too far ahead for what is read next
    return False

  def _advance(self, index: int, skips_none: bool = False) -> bool:
    """Decodes up to a frame, or the next one if it is missing; returns whether one was found.

    Args:
      index: index of the frame.
      skips_none: decodes every frame on the way.
    """
    knows_all = bool(self.timeline.frame_of_packet) and not self.timeline.first_of_stamp
    self._may_skip = knows_all and self._codec.name in _CODECS_THAT_SKIP and not skips_none
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
    self._next_frames = self._decode(*self._packets_from(key))

  def _packets_from(self, key: int) -> tuple[int, Iterable[av.Packet]]:
    """Returns packets from the `key`-th key frame on, or from one before it; and the first's index.

    If the file cannot seek there, it is opened again, and its packets are read from the start.
    """
    timeline, step = self.timeline, 1
    while (wanted := timeline.key_frames[key]).offset is not None:
      try:
        self._container.seek(
          wanted.offset, stream=self._stream, unsupported_byte_offset=timeline.jumps_to_bytes
        )
      except av.FFmpegError:  # the format cannot seek, such as gif
        break
      packets = self._container.demux(self._stream)
      first = next((packet for packet in packets if packet.is_keyframe), None)
      number = timeline.packet_at.get(timeline.place(first)) if first else None
      if number is not None and number <= wanted.packet:
        return number, itertools.chain([first], packets)
      if key == 0:
        break
      key, step = max(0, key - step), 2 * step  # some formats jump too far
    self.close()
    self._open()
    return 0, self._container.demux(self._stream)

  def _decode(
    self, first: int, packets: Iterable[av.Packet]
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame index, frame) in presentation order, at least up to the end of the segment.

    Args:
      first: the index of the first packet.
      packets: all packets from there on.
    """
    frame_of_packet, first_of_stamp = self.timeline.frame_of_packet, self.timeline.first_of_stamp
    count, counts = itertools.count(), collections.Counter()  # of all frames, of each stamp
    for number, packet in enumerate(packets, start=first):
      # The decoder gives the frame the stamp of its packet; after a jump, stamps may be wrong.
      index = frame_of_packet[number] if number < len(frame_of_packet) else None
      packet.pts, packet.dts = index, None
      # After the end of the segment no frame is skipped, so that the next one can continue there.
      is_target = index in self._targets
      is_unwanted = (
        self._may_skip
        and index is not None
        and (index < self._last_target or self._is_jump_next)
        and not is_target
      )
      self._codec.skip_frame = "NONREF" if is_unwanted else "DEFAULT"
      if is_target:
        self._sent.add(index)
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
        shown = frame.pts if frame_of_packet else next(count)
        if shown in first_of_stamp:
          first = first_of_stamp[shown]
          shown = first + counts[first]
          counts[first] += 1
        if shown is not None:
          yield shown, frame
      if is_end:
        return


@contextlib.contextmanager
def one_error(
  path: str | Path, what: str = "not a video, or its end with the index is missing"
) -> Iterator[None]:
  """Turns every error inside the block into an `InputError` that names the file.

  It is needed because PyAV raises errors of many types about a damaged file: FFmpeg's, but also an
  IndexError if a stream vanishes while it is read.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    reason = getattr(error, "strerror", None) or type(error).__name__
    raise InputError(
      f"{path}: {what} ({reason}); copy the file again or re-encode it, e.g. as H.264 mp4"
    ) from server_failure(error)


def _choose_film(streams: list[av.VideoStream]) -> av.VideoStream:
  """Returns the stream that is the film, where there are previews, too.

  As in FFmpeg, the default stream is preferred, and a film to a short one; of two films the larger
  one, then the longer one, then the first.
  """
  lengths = [header_seconds(stream) for stream in streams]
  shortest_film = max(lengths) / 2

  def rank(number: int):
    stream, length = streams[number], lengths[number]
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    codec = stream.codec_context
    num_pixels = codec.width * codec.height if codec else float("inf")  # unknown without a decoder
    return is_default, length >= shortest_film, num_pixels, length

  return streams[max(range(len(streams)), key=rank)]


def _is_animated_webp(path: str | Path) -> bool:
  """Returns whether the header of a WebP file says that it is an animation."""
  head = read_start(path, 21)
  return head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
  """Returns the part (a, b, c, d) of the matrix by which a frame is shown.

  The camera recorded it. The pixel (x, y) is shown at (ax + cy, bx + dy).
  """
  try:
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
  except ValueError:  # PyAV does not know another kind of data that lies beside it, such as EXIF
    return _TURNS[round(frame.rotation / 90) % 4]
  if matrix is None:
    return _TURNS[0]
  a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
  return a, b, c, d


def _as_shown(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
  """Rotates and mirrors a picture by its matrix, rounded to quarters of a turn."""
  a, b, c, d = matrix
  if abs(b) + abs(c) > abs(a) + abs(d):
    pixels, a, d = pixels.swapaxes(0, 1), c, b
  return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
