"""Finds when each frame of a video file is shown, without decoding any frame."""

import bisect
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from videochat_flash_jax.errors import InputError


class NoFrames(InputError):
  """The error of a video whose header can be read, but which has no frames."""


@dataclasses.dataclass(frozen=True)
class Timeline:
  """When each frame is shown, and at which frames decoding can start.

  Frames are numbered in presentation order; B-frames are decoded in another order. Time stamps
  count in units of the stream's time base. A file of 4 frames at 10 fps with time base 1/1000, of
  which the first and the third are key frames, has stamps 0 100 200 300, key_frames 0 2, seconds
  2/5.

  Attributes:
    num_frames: number of frames.
    seconds: from the start of the first frame to the end of the last one.
    stamps: one a frame, rising; empty if the file has none from which the order can be found.
    key_frames: indices of the key frames, rising, the first is 0.
  """

  num_frames: int
  seconds: Fraction
  stamps: list[int]
  key_frames: list[int]

  @functools.cached_property
  def number_of_stamp(self) -> dict[int, int]:
    """The frame index of each time stamp."""
    return {stamp: number for number, stamp in enumerate(self.stamps)}

  def key_before(self, number: int) -> int:
    """Returns which key frame is the last one shown at or before frame `number`, as an index."""
    return bisect.bisect_right(self.key_frames, number) - 1

  def segments(self, indices: Iterable[int]) -> Iterator[list[int]]:
    """Cuts frame indices into segments, each of which is decoded forward without a jump.

    A new segment begins where decoding must go back, and where it is better to jump ahead to a key
    frame. Key frames 0 and 50: 3 7 49 55 60 59 are the segments 3 7 49 | 55 60 | 59; but 49 50 is
    one segment.
    """
    segment: list[int] = []
    for index in indices:
      if segment and (
        index < segment[-1] or self.key_frames[self.key_before(index)] > segment[-1] + 1
      ):
        yield segment
        segment = []
      segment.append(index)
    if segment:
      yield segment


def read_timeline(container, stream, path: Path) -> Timeline:
  """Reads all packets of a stream, without decoding; `path` is for error messages.

  Raises:
    NoFrames: the stream holds no frame.
    InputError: it holds fewer frames than its header promises.
  """
  packets, num_readable, first_key = [], 0, None
  for packet in container.demux(stream):
    num_readable += packet.pts is not None and not packet.is_corrupt
    if packet.size:  # the last packet is empty, it only flushes the decoder
      if first_key is None and packet.is_keyframe:
        first_key = (packet.pts,)  # a frame that needs earlier packets cannot be decoded
      if first_key is not None and not packet.is_discard:  # an edit list may hide frames
        packets.append((packet.pts, packet.is_keyframe, packet.duration or 0))
  if not packets:
    raise without_frames(path)

  rate = stream.average_rate or Fraction(1)
  stamps = {stamp for stamp, _, _ in packets}
  # The stamps of AVI number the frames in decoding order.
  is_decoding_order = container.format.name == "avi" and stream.codec_context.has_b_frames
  if is_decoding_order or None in stamps or len(stamps) < len(packets):
    # Without usable stamps, the decoder counts the frames as they come out.
    return Timeline(len(packets), len(packets) / rate, [], [0])
  packets = sorted(packet for packet in packets if packet[:1] >= first_key)
  timeline = Timeline(
    len(packets),
    _measure_seconds(packets, stream.time_base, rate),
    [stamp for stamp, _, _ in packets],
    [number for number, (_, is_key, _) in enumerate(packets) if is_key or number == 0],
  )
  num_promised = _count_promised(stream, timeline)
  if num_readable < num_promised:
    raise truncated(path, num_readable, num_promised)
  return timeline


def without_frames(path: Path) -> NoFrames:
  """Returns the error of a file that ends after its header."""
  return NoFrames(f"{path}: it has no video frames; copy it again or re-encode it")


def truncated(path: Path, num_read: int, num_frames: int) -> InputError:
  """Returns the error of a file that ends early."""
  return InputError(
    f"{path}: the file is truncated or damaged, only {num_read} of its {num_frames} frames can be "
    "read; copy or download it again"
  )


def _measure_seconds(packets, time_base: Fraction, rate: Fraction) -> Fraction:
  """Returns the time that packets (stamp, is key frame, duration), sorted by stamp, take."""
  span = (packets[-1][0] + packets[-1][2] - packets[0][0]) * time_base
  by_rate = len(packets) / rate
  # A constant rate is exact where stamps are rounded (to 1 ms in Matroska): 8 s must not be 7.999.
  return by_rate if not span or abs(by_rate - span) <= 1 / rate else span


def _count_promised(stream, timeline: Timeline) -> int:
  """Returns how many frames the header of the file promises, at least.

  An mp4 file lists every frame. Matroska states when the last frame ends; this is used only if the
  frames end earlier than that by more than the longest frame lasts.
  """
  ends = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
  if ends and timeline.num_frames > 1:
    hours, minutes, seconds = map(float, ends.groups())
    promised_end = (3600 * hours + 60 * minutes + seconds) / stream.time_base
    longest = max(np.diff(timeline.stamps))
    if timeline.stamps[-1] + 2 * longest < promised_end:
      return round(timeline.num_frames * promised_end / (timeline.stamps[-1] + longest))
  return len(stream.index_entries)
