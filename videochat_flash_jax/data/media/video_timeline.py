"""Finds when each frame of a video file is shown, without decoding any frame."""

import bisect
import collections
import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

from videochat_flash_jax.data.media.video_packets import (
  Packet,
  Packets,
  count_promised,
  may_jump_ahead,
  measure_seconds,
  read_packets,
  sort_by_time,
)
from videochat_flash_jax.errors import InputError


class NoFrames(InputError):
  """The error of a video whose header can be read, but which has no frames."""


@dataclasses.dataclass(frozen=True)
class KeyFrame:
  """A place in the file at which decoding can start.

  Attributes:
    frame: its frame index. All frames from this one on come later in the file.
    packet: index of its packet, in the order of the file.
    offset: where to jump to: a time stamp or a byte, see `Timeline.jumps_to_bytes`. None if no jump
      leads there: the first one is also reached by opening the file again.
  """

  frame: int
  packet: int
  offset: int | None


@dataclasses.dataclass(frozen=True)
class Timeline:
  """When each frame is shown, and at which frames decoding can start.

  Frames are numbered in presentation order; the packets that hold them lie in the file in decoding
  order. A file of 4 frames at 10 fps, stored in the order 0 2 1 3, of which the first and the last
  are key frames, has frame_of_packet 0 2 1 3, key frames 0 and 3, seconds 2/5.

  Attributes:
    num_frames: number of frames.
    seconds: from the start of the first frame to the end of the last one.
    frame_of_packet: one a packet of the stream: the index of its frame, or None if the frame is not
      shown. Empty if the file does not tell the order, so that only decoding does.
    first_of_stamp: for each frame that shares its stamp, the first frame with this stamp. Which of
      them is in which packet is only known once they are decoded.
    key_frames: rising; the first one leads to frame 0.
    jumps_to_bytes: whether offsets of key frames count bytes of the file; otherwise they are time
      stamps.
    packet_at: index of each packet at which decoding can start, by its `place`.
  """

  num_frames: int
  seconds: Fraction
  frame_of_packet: list[int | None]
  first_of_stamp: dict[int, int]
  key_frames: list[KeyFrame]
  jumps_to_bytes: bool
  packet_at: dict[tuple, int]

  def place(self, packet) -> tuple:
    """Returns what identifies a packet after a jump.

    Stamps after a jump to a byte are guesses, where one header has the stamp of several frames.
    """
    return (packet.pos,) if self.jumps_to_bytes else (packet.pos, packet.pts)

  def key_before(self, frame: int) -> int:
    """Returns which key frame is the last one shown at or before a frame, as an index."""
    return bisect.bisect_right(self.key_frames, frame, key=lambda key: key.frame) - 1

  def segments(self, indices: Iterable[int]) -> Iterator[list[int]]:
    """Cuts frame indices into segments, each of which is decoded forward without a jump.

    A new segment begins where decoding must go back, and where it is better to jump ahead to a key
    frame. Key frames 0 and 50: 3 7 49 55 60 59 are the segments 3 7 49 | 55 60 | 59; but 49 50 is
    one segment.
    """
    segment: list[int] = []
    for index in indices:
      if segment and (
        index < segment[-1] or self.key_frames[self.key_before(index)].frame > segment[-1] + 1
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
  packets = read_packets(container, stream)
  if not packets.recordings:
    raise without_frames(path)
  num_promised = count_promised(packets, container, stream, path)
  if packets.num_readable < num_promised:
    raise truncated(path, packets.num_readable, num_promised)
  timeline = Timeline(
    num_frames=packets.num_frames,
    seconds=measure_seconds(packets, container, stream),
    frame_of_packet=[],
    first_of_stamp={},
    key_frames=[KeyFrame(0, packets.keys[0].index, None)],
    # Where stamps may jump, a stamp may stand for several frames.
    jumps_to_bytes=may_jump_ahead(container),
    packet_at={},
  )
  in_order = sort_by_time(packets, container, stream.time_base)
  return _with_order(timeline, packets, in_order) if in_order else timeline


def _with_order(timeline: Timeline, packets: Packets, in_order: list[Packet]) -> Timeline:
  """Adds which frame each packet holds, and where the decoder can jump to."""
  frame_of_packet: list[int | None] = [None] * packets.total
  first_of_stamp: dict[int, int] = {}
  for frame, packet in enumerate(in_order):
    frame_of_packet[packet.index] = frame
    if frame and packet.pts == in_order[frame - 1].pts:
      first = first_of_stamp.setdefault(frame - 1, frame - 1)
      first_of_stamp[frame] = first
  places = collections.Counter(map(timeline.place, packets.keys))
  # By a stamp, a jump leads to one of the joined recordings, and reading may end with it.
  can_jump = timeline.jumps_to_bytes or len(packets.recordings) == 1
  packet_at, key_frames = {}, []
  latest, start = 0, packets.keys[0].index  # the latest frame that comes before a key frame
  for key in packets.keys:
    before = frame_of_packet[start : key.index]
    latest, start = max(latest, *(frame for frame in before if frame is not None), 0), key.index
    offset = key.pos if timeline.jumps_to_bytes else key.pts
    is_found_again = can_jump and offset is not None and places[timeline.place(key)] == 1
    if is_found_again:
      packet_at[timeline.place(key)] = key.index
    if not key_frames:
      key_frames.append(KeyFrame(0, key.index, offset if is_found_again else None))
      continue
    frame = frame_of_packet[key.index]
    if is_found_again and frame is not None and frame > latest and frame not in first_of_stamp:
      key_frames.append(KeyFrame(frame, key.index, offset))
  return dataclasses.replace(
    timeline,
    frame_of_packet=frame_of_packet,
    first_of_stamp=first_of_stamp,
    key_frames=key_frames,
    packet_at=packet_at,
  )


def without_frames(path: Path) -> NoFrames:
  """Returns the error of a file that ends after its header."""
  return NoFrames(f"{path}: it has no video frames; copy it again or re-encode it")


def truncated(path: Path, num_read: int, num_frames: int) -> InputError:
  """Returns the error of a file that ends early."""
  return InputError(
    f"{path}: the file is truncated or damaged, only {num_read} of its {num_frames} frames can be "
    "read; copy or download it again"
  )
