"""The frames of a video file in presentation order, told without decoding any."""

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
  """A video whose header is sound, and behind which there are no frames."""


@dataclasses.dataclass(frozen=True)
class Timeline:
  """When each frame is shown, and at which ones decoding can start.

  Frames are numbered in presentation order; B-frames are decoded in another one. Time stamps
  count in the stream's time base. A file of 4 frames at 10 fps, time base 1/1000, of which the
  first and the third are key frames: stamps 0 100 200 300, key_frames 0 2, seconds 2/5.
  """

  num_frames: int
  seconds: Fraction  # from the first frame's start to the last one's end
  stamps: list[int]  # one a frame, rising; empty where the file has none that tell an order
  key_frames: list[int]  # numbers of frames, rising, from 0

  @functools.cached_property
  def number_of_stamp(self) -> dict[int, int]:
    """Frame number of a time stamp."""
    return {stamp: number for number, stamp in enumerate(self.stamps)}

  def key_before(self, number: int) -> int:
    """Which of the key frames is the last one that is shown no later than frame `number`."""
    return bisect.bisect_right(self.key_frames, number) - 1

  def runs(self, indices: Iterable[int]) -> Iterator[list[int]]:
    """Cuts frame numbers where it is best to jump on: to a key frame, or back.

    Key frames 0 and 50: 3 7 49 55 60 59 are the runs 3 7 49 | 55 60 | 59; but 49 50 is one run.
    """
    run: list[int] = []
    for index in indices:
      if run and (index < run[-1] or self.key_frames[self.key_before(index)] > run[-1] + 1):
        yield run
        run = []
      run.append(index)
    if run:
      yield run


def read_timeline(container, stream, path: Path) -> Timeline:
  """Walks over all packets of a stream; `path` is for messages.

  Raises:
    NoFrames: the stream holds no frame.
    InputError: it holds fewer than its header speaks of.
  """
  packets, num_readable, first_key = [], 0, None
  for packet in container.demux(stream):
    num_readable += packet.pts is not None and not packet.is_corrupt
    if packet.size:  # the last packet is an empty one, which flushes the decoder
      if first_key is None and packet.is_keyframe:
        first_key = (packet.pts,)  # what needs earlier packets cannot be decoded
      if first_key is not None and not packet.is_discard:  # an edit list hides some
        packets.append((packet.pts, packet.is_keyframe, packet.duration or 0))
  if not packets:
    raise without_frames(path)

  rate = stream.average_rate or Fraction(1)
  stamps = {stamp for stamp, _, _ in packets}
  # AVI numbers frames in the order in which they are decoded.
  is_mixed_up = container.format.name == "avi" and stream.codec_context.has_b_frames
  if is_mixed_up or None in stamps or len(stamps) < len(packets):  # decoding counts them instead
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
  """The error of a file that ends behind its header."""
  return NoFrames(f"{path}: it has no video frames; copy it again or re-encode it")


def truncated(path: Path, num_read: int, num_frames: int) -> InputError:
  """The error of a file that ends early."""
  return InputError(
    f"{path}: the file is truncated or damaged, only {num_read} of its {num_frames} frames can be "
    "read; copy or download it again"
  )


def _measure_seconds(packets, time_base: Fraction, rate: Fraction) -> Fraction:
  """The time that sorted packets (stamp, is key frame, duration) take."""
  span = (packets[-1][0] + packets[-1][2] - packets[0][0]) * time_base
  by_rate = len(packets) / rate
  # A steady rate is exact where stamps are rounded (to 1 ms in Matroska): 8 s must not be 7.999.
  return by_rate if not span or abs(by_rate - span) <= 1 / rate else span


def _count_promised(stream, timeline: Timeline) -> int:
  """How many frames the file's header speaks of, at least.

  An mp4 lists every frame. Matroska tells when the last one ends; it is believed only where
  the frames end earlier by more than any of them lasts.
  """
  ends = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
  if ends and timeline.num_frames > 1:
    hours, minutes, seconds = map(float, ends.groups())
    promised_end = (3600 * hours + 60 * minutes + seconds) / stream.time_base
    longest = max(np.diff(timeline.stamps))
    if timeline.stamps[-1] + 2 * longest < promised_end:
      return round(timeline.num_frames * promised_end / (timeline.stamps[-1] + longest))
  return len(stream.index_entries)
