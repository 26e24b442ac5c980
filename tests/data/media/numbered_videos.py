"""Videos whose frames show their number, so that a wrong frame is noticed whatever the codec."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SHORT_GROUPS = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:b-adapt=0"}
OPEN_GROUPS = {"x264-params": "keyint=12:min-keyint=1:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}
NO_B_FRAMES = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "20"}
MPEG2 = {"bf": "2", "g": "12"}


def number_shown(frame: np.ndarray) -> int:
  """The number that a frame shows: 4 x 4 blocks, white for 1, bit b at row b // 4, column b % 4."""
  height, width = frame.shape[0] // 4, frame.shape[1] // 4
  blocks = frame[: 4 * height, : 4 * width].reshape(4, height, 4, width, 3)
  inner = blocks[:, height // 4 : -(height // 4), :, width // 4 : -(width // 4)]
  bits = inner.mean(axis=(1, 3, 4)).flatten() > 127
  return sum(1 << bit for bit in np.flatnonzero(bits).tolist())


def write_numbers(
  path: Path,
  numbers,
  file_format: str,
  codec: str,
  options: dict,
  *,
  fps=25,
  first: int = 0,
  milliseconds: list[int] | None = None,
  size: int = 64,
  pixels: str = "yuv420p",
  muxer: dict | None = None,
  has_sound: bool = False,
  change=None,
) -> Path:
  """Writes one frame a number.

  Args:
    path: where to.
    numbers: what the frames show.
    file_format: FFmpeg's name of the format.
    codec: FFmpeg's name of the encoder.
    options: of the encoder.
    fps: the steady rate, unless `milliseconds` are given.
    first: stamp of the first frame, in frames.
    milliseconds: when the frames are shown.
    size: height and width.
    pixels: FFmpeg's name of the pixel format.
    muxer: options of the format.
    has_sound: adds silence, whose packets lie between those of the frames.
    change: is called with the list of packets and may change them.
  """
  numbers = list(numbers)
  with av.open(str(path), "w", format=file_format, options=muxer or {}) as container:
    sound = container.add_stream("mp2", rate=48_000) if has_sound else None
    stream = container.add_stream(codec, rate=fps, options=options)
    stream.height, stream.width, stream.pix_fmt = size, size, pixels
    if milliseconds:
      stream.codec_context.time_base = Fraction(1, 1000)
    packets = []
    for index, number in enumerate(numbers):
      bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4) * 255
      picture = np.kron(bits, np.ones((size // 4, size // 4), np.uint8))
      frame = av.VideoFrame.from_ndarray(np.repeat(picture[..., None], 3, axis=-1))
      frame = frame.reformat(format=pixels)
      frame.pts = milliseconds[index] if milliseconds else first + index
      packets += stream.encode(frame)
    packets += stream.encode(None)
    if change:
      change(packets)
    if has_sound:
      packets += _silence(sound, first / fps, len(numbers) / fps)
      packets.sort(key=lambda packet: packet.dts * packet.time_base)
    container.mux(packets)
  return path


def _silence(sound, first_second: float, seconds: float) -> list[av.Packet]:
  length, packets = sound.codec_context.frame_size or 1152, []
  for number in range(int(seconds * 48_000 / length)):
    samples = np.zeros((1, 2 * length), np.int16)
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
    frame.sample_rate, frame.pts = 48_000, round(first_second * 48_000) + number * length
    packets += sound.encode(frame)
  return packets + sound.encode(None)
