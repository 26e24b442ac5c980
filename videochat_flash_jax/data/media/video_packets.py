"""Reads the packets of a video stream, without decoding them, and measures how long it is shown.

Every packet holds one frame. Packets lie in the file in decoding order. Their time stamps tell in
which order the frames are shown, in most files: stamps may be missing, repeated or mixed up, and
they start anew where several recordings were joined to one file, byte by byte.
"""

import dataclasses
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from videochat_flash_jax.data.media.files import read_start

# A joined recording begins where a key frame is shown before this many frames that come earlier in
# the file. Stamps that are mixed up go back over fewer frames.
_FRAMES_PASSED = 3
# From one packet to the next, times go back or (in broadcasts) ahead by more than this, in seconds,
# only where recordings are joined. The second limit is FFmpeg's.
_LONGEST_STEP_BACK, _LONGEST_STEP = 1, 10
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the first elements of Matroska


class Packet(NamedTuple):
  """What a packet tells of its frame. Times count in units of the stream's time base.

  Attributes:
    index: its number among the packets of the stream, in the order of the file.
    pts: when the frame is shown, or None.
    dts: when it is decoded, or None.
    duration: how long it is shown; 0 if unknown.
    is_key: whether decoding can start here.
    pos: the first byte of the packet in the file, or of a header that it shares with others; None
      if unknown.
    is_shown: whether its frame is part of the video.
  """

  index: int
  pts: int | None
  dts: int | None
  duration: int
  is_key: bool
  pos: int | None
  is_shown: bool

  @property
  def stamp(self) -> int | None:
    """The best time that is known."""
    return self.dts if self.pts is None else self.pts


@dataclasses.dataclass(frozen=True)
class Packets:
  """The packets of a video stream.

  Attributes:
    recordings: the packets whose frames are shown, in the order of the file; one list for each of
      the recordings that were joined.
    keys: the packets at which decoding can start.
    total: number of packets, with those whose frames are not shown.
    num_readable: number of packets that have a stamp and are not damaged.
  """

  recordings: list[list[Packet]]
  keys: list[Packet]
  total: int
  num_readable: int

  @property
  def num_frames(self) -> int:
    """Number of frames that are shown."""
    return sum(map(len, self.recordings))


def read_packets(container, stream) -> Packets:
  """Reads all packets of a stream."""
  # A bare stream has no stamps, FFmpeg guesses them. Those of AVI and ASF tell when frames are
  # decoded.
  is_bare = bool(container.format.flags & av.format.Flags.no_timestamps.value)
  is_decoding_time = container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames
  packets, num_readable = [], 0
  for index, packet in enumerate(container.demux(stream)):
    num_readable += packet.pts is not None and not packet.is_corrupt
    packets.append(
      Packet(
        index=index,
        pts=None if is_bare or is_decoding_time else packet.pts,
        dts=None if is_bare else packet.dts,
        duration=packet.duration or 0,
        is_key=packet.is_keyframe,
        pos=packet.pos,
        is_shown=bool(packet.size) and not packet.is_discard,  # an edit list may hide frames
      )
    )
  # Some formats mark no key frame: their first frame is one.
  keys = [packet for packet in packets if packet.is_key] or packets[:1]
  shown = [packet for packet in packets if packet.is_shown and _can_be_decoded(packet, keys)]
  recordings = _cut(shown, stream.time_base, may_jump_ahead(container)) if shown else []
  return Packets(recordings, keys, len(packets), num_readable)


def may_jump_ahead(container) -> bool:
  """Returns whether the stamps of a format may jump ahead: those of broadcasts, .ts and .mpg."""
  return bool(container.format.flags & av.format.Flags.ts_discont.value)


def _can_be_decoded(packet: Packet, keys: list[Packet]) -> bool:
  """Returns whether a frame needs no frames from before the file begins.

  The others come before the first key frame in the file, or are shown before it. From the second
  key frame on, all can be decoded.
  """
  if len(keys) > 1 and packet.index >= keys[1].index:
    return True
  is_earlier = None not in (packet.pts, keys[0].pts) and packet.pts < keys[0].pts
  return packet.index >= keys[0].index and not is_earlier


def _cut(shown: list[Packet], time_base: Fraction, may_jump_ahead: bool) -> list[list[Packet]]:
  """Cuts packets where the stamps start anew."""
  furthest_back = -float(_LONGEST_STEP_BACK / time_base)
  furthest = float(_LONGEST_STEP / time_base) if may_jump_ahead else math.inf
  recordings: list[list[Packet]] = [shown[:1]]
  latest: list[int] = []  # the latest stamps of this recording, rising
  for previous, packet, after in zip(shown, shown[1:], [*shown[2:], shown[-1]], strict=False):
    if previous.pts is not None:
      latest = sorted([*latest, previous.pts])[-_FRAMES_PASSED:]
    has_times = None not in (packet.dts, previous.dts)
    step = packet.dts - previous.dts if has_times else 0
    step_shown = packet.pts - latest[-1] if latest and packet.pts is not None else 0
    # A single stamp that goes back is only mixed up.
    goes_back = (
      packet.is_key
      and len(latest) == _FRAMES_PASSED
      and None not in (packet.pts, after.pts)
      and max(packet.pts, after.pts) < latest[0]
    )
    if goes_back or step < furthest_back or max(step, step_shown) > furthest:
      recordings.append([])
      latest = []
    recordings[-1].append(packet)
  return recordings


def sort_by_time(packets: Packets, container, time_base: Fraction) -> list[Packet] | None:
  """Returns the packets in the order of their stamps, of equal ones in the order of the file.

  Returns None if the stamps do not tell in which order frames are shown: only decoding does.
  """
  in_order = []
  for recording in packets.recordings:
    if any(packet.pts is None for packet in recording):
      return None
    if may_jump_ahead(container) and _are_stamps_strange(recording, time_base):
      return None
    in_order += sorted(recording, key=lambda packet: packet.pts)
  return in_order


def _are_stamps_strange(recording: list[Packet], time_base: Fraction) -> bool:
  """Returns whether frames of a broadcast may be shown in another order than their stamps tell.

  Where one header has the stamp of several frames, FFmpeg guesses the others, and equal ones show
  that it guessed wrong. Where recordings are joined, a packet may have a stamp of the next one, far
  from the time at which its frame is decoded.
  """
  stamps = [packet.pts for packet in recording]
  farthest = _LONGEST_STEP / time_base
  return len(set(stamps)) < len(stamps) or any(
    packet.dts is not None and abs(packet.pts - packet.dts) > farthest for packet in recording
  )


def measure_seconds(packets: Packets, container, stream) -> Fraction:
  """Returns the length: from the start of the first frame to the end of the last one."""
  rate = stream.average_rate or stream.guessed_rate or Fraction(1)
  by_rate = packets.num_frames / rate
  is_joined = len(packets.recordings) > 1
  end = 0 if is_joined else promised_end(stream) / stream.time_base
  longest = _LONGEST_STEP / stream.time_base if may_jump_ahead(container) else math.inf
  lengths = [_length(recording, end, longest) for recording in packets.recordings]
  if None in lengths:  # no stamps, and not even durations
    return header_seconds(stream) or by_rate
  seconds = sum(lengths) * stream.time_base
  # A constant rate is exact where stamps are rounded (to 1 ms in Matroska): 8 s must not be 7.999.
  return by_rate if not seconds or abs(by_rate - seconds) <= 1 / rate else seconds


def _length(
  recording: list[Packet], end: Fraction | int, longest: Fraction | float
) -> Fraction | int | None:
  """Returns how long a recording is shown, in units of the time base, or None.

  Args:
    recording: its packets.
    end: when its last frame ends by the header of the file, or 0.
    longest: the longest time between two frames. Where recordings are joined, a packet may have a
      stamp of the next one.
  """
  if None in (packet.stamp for packet in recording):
    durations = [packet.duration for packet in recording]
    return sum(durations) if all(durations) else None
  stamps = sorted(packet.stamp for packet in recording)
  gaps = [after - before for before, after in itertools.pairwise(stamps)]
  span = sum(gap for gap in gaps if gap <= longest)
  last = max(recording, key=lambda packet: packet.stamp)
  return max(span + (last.duration or Fraction(span, max(1, len(gaps)))), end - stamps[0])


def promised_end(stream) -> Fraction:
  """Returns when the last frame ends by the header of a Matroska file, in seconds; otherwise 0."""
  end = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
  hours, minutes, seconds = map(Fraction, end.groups()) if end else (0, 0, Fraction(0))
  return 3600 * hours + 60 * minutes + seconds


def header_seconds(stream) -> Fraction:
  """Returns the length of a stream by the header of its file, in seconds; 0 if it does not tell."""
  return promised_end(stream) or (stream.duration or 0) * stream.time_base


def count_promised(packets: Packets, container, stream, path: str | Path) -> int:
  """Returns how many packets the header of the file promises, at least.

  An mp4 file lists every frame. Matroska states how many bytes there are, and when the last frame
  ends: if both are missing, the number of frames is estimated.
  """
  recording = packets.recordings[-1]
  if len(recording) > 1 and all(packet.stamp is not None for packet in recording):
    stamps = sorted(packet.stamp for packet in recording)
    longest = max(after - before for before, after in itertools.pairwise(stamps))
    end, promised = stamps[-1] + longest, promised_end(stream) / stream.time_base
    if promised > end + longest / 2 and _is_cut_off(container, path):
      return round(packets.num_frames * promised / end)
  return len(stream.index_entries)


def _is_cut_off(container, path: str | Path) -> bool:
  """Returns whether a Matroska file has fewer bytes than its header says.

  The file is two elements, each of which is a name of four bytes, a size, and a content.
  """
  head = read_start(path, 1024)
  size, start = _element_size(head, len(_EBML))
  segment = start + (size or 0)
  if not head.startswith(_EBML) or not head.startswith(_SEGMENT, segment):
    return False
  size, start = _element_size(head, segment + len(_SEGMENT))
  return size is not None and start + size > container.size


def _element_size(head: bytes, at: int) -> tuple[int | None, int]:
  """Returns the size of a Matroska element, None if it is unknown, and where its content begins.

  As many bits as there are bytes less one are zeros, then a one follows, then the size.
  """
  num_bytes = 9 - head[at].bit_length()
  unknown = (1 << 7 * num_bytes) - 1
  size = int.from_bytes(head[at : at + num_bytes]) & unknown
  return None if size == unknown else size, at + num_bytes
