"""Small videos for tests, written with the encoders of PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

HEIGHT, WIDTH = 48, 64
SHORT_GROUPS = {"x264-params": "keyint=12:min-keyint=12:bframes=3"}
OPEN_GROUPS = {"x264-params": "keyint=12:min-keyint=1:bframes=3:open-gop=1:scenecut=0"}
REALTIME_VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "16"}


def pictures(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  """Frames that move, and grow brighter from one to the next."""
  noise = np.random.default_rng(0).integers(0, 40, (height, width, 3), dtype=np.uint8)
  brightness = np.linspace(0, 210, num_frames).astype(np.uint8)
  return np.stack([np.roll(noise, i, axis=1) + brightness[i] for i in range(num_frames)])


def write_video(
  path: Path,
  frames: Sequence[np.ndarray],
  fps=10,
  codec: str = "libx264",
  options: dict | None = None,
  pixels: str = "yuv420p",
  stamps: list[int] | None = None,
  muxer: dict | None = None,
  title: str = "",
) -> Path:
  """Encodes frames, shown at a steady rate or at `stamps` in milliseconds."""
  with av.open(str(path), "w", options=muxer or {}) as container:
    container.metadata["title"] = title
    stream = container.add_stream(codec, rate=fps, options=options or {})
    stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
    if stamps:
      stream.codec_context.time_base = Fraction(1, 1000)
    for number, picture in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
      frame.pts = stamps[number] if stamps else number
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def decode_everything(path: Path) -> np.ndarray:
  to_rgb = VideoReformatter()
  with av.open(str(path)) as container:
    frames = container.decode(video=0)
    return np.stack([to_rgb.reformat(frame, format="rgb24").to_ndarray() for frame in frames])


FILES = {
  "b_frames.mp4": {"options": SHORT_GROUPS},
  "open_groups.mp4": {"options": OPEN_GROUPS},
  "one_group.mp4": {},
  "fragments.mp4": {"options": SHORT_GROUPS, "muxer": {"movflags": "frag_keyframe+empty_moov"}},
  "b_frames.mkv": {"options": SHORT_GROUPS},
  "open_groups.mkv": {"options": OPEN_GROUPS},
  "vp9.webm": {"codec": "libvpx-vp9", "options": REALTIME_VP9},
  "picture.gif": {"codec": "gif", "pixels": "rgb8"},
  "broadcast.ts": {"options": OPEN_GROUPS},
  "no_time_stamps.h264": {"options": SHORT_GROUPS},
}
