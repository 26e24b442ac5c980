"""Many kinds of video files, each a few kilobytes: codecs, containers, groups and time stamps."""

import dataclasses
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter


@dataclasses.dataclass(frozen=True)
class Odd:
  """How a file is made."""

  codec: str = "libx264"
  options: dict = dataclasses.field(default_factory=dict)
  num_frames: int = 60
  height: int = 48
  width: int = 64
  pixels: str = "yuv420p"
  fps: Fraction = Fraction(30)
  variable: bool = False  # the rate
  first_stamp: int = 0  # of the first frame, in frames; below 0, an edit list cuts frames
  rotation: int = 0  # degrees counterclockwise
  muxer: dict = dataclasses.field(default_factory=dict)
  counts_on: bool = True  # False: fewer frames can be decoded than were written


def _x264(parameters: str, **fields) -> Odd:
  fields.setdefault("codec", "libx264")
  options = {"preset": "veryfast", "x264-params": parameters}
  return Odd(options=options, **fields)


def _x265(parameters: str, **fields) -> Odd:
  options = {"preset": "ultrafast", "x265-params": parameters + ":log-level=none:pools=none"}
  return Odd("libx265", options, **fields)


def _vp9(group: int, **fields) -> Odd:
  return Odd("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": str(group)}, **fields)


_GROUPS = "keyint=12:min-keyint=12:scenecut=0"
_OPEN = "keyint=12:min-keyint=1:scenecut=0:bframes=3:open-gop=1"
_PYRAMID = _GROUPS + ":bframes=5:b-adapt=0:b-pyramid=normal:ref=4"
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
_ALL_INTRA = Odd("mjpeg", pixels="yuvj420p")
_MPEG4 = {"g": "12"}
_MPEG4_B = {"g": "12", "bf": "2"}
_NTSC = Fraction(30000, 1001)

ODD_VIDEOS = {
  "h264_one_frame.mp4": _x264(_GROUPS, num_frames=1),
  "h264_two_frames.mkv": _x264(_GROUPS, num_frames=2),
  "h264_long.mp4": _x264("keyint=250:scenecut=0", num_frames=20_000, height=32, width=32),
  "h264_one_group.mp4": _x264("keyint=infinite:bframes=3"),
  "h264_all_intra.mp4": _x264("keyint=1"),
  "h264_no_b.mp4": _x264(_GROUPS + ":bframes=0"),
  "h264_pyramid.mp4": _x264(_PYRAMID, num_frames=200, fps=_NTSC),
  "h264_pyramid_strict.mkv": _x264(_PYRAMID.replace("normal", "strict")),
  "h264_scene_cuts.mp4": _x264("keyint=40:min-keyint=2:scenecut=80:bframes=3"),
  "h264_open_groups.mp4": _x264(_OPEN),
  "h264_open_groups.mkv": _x264(_OPEN, num_frames=150),
  "h264_open_groups.ts": _x264(_OPEN, num_frames=150),
  "h264_intra_refresh.mp4": _x264("keyint=20:intra-refresh=1:bframes=0", num_frames=100),
  "h264_intra_refresh.ts": _x264("keyint=20:intra-refresh=1:bframes=0", num_frames=100),
  "h264_interlaced.mp4": _x264(_PYRAMID + ":tff=1"),
  "h264_many_slices.mp4": _x264(_PYRAMID + ":slices=3"),
  "h264_10_bit.mp4": _x264(_PYRAMID, pixels="yuv420p10le"),
  "h264_444_odd_size.mkv": _x264(_PYRAMID, pixels="yuv444p", height=45, width=67),
  "h264_cropped.mp4": _x264(_PYRAMID, height=50, width=66),
  "h264_upright.mp4": _x264(_GROUPS, rotation=-90),
  "h264_upside_down.mov": _x264(_GROUPS, rotation=180),
  "h264_variable.mp4": _x264(_PYRAMID, variable=True),
  "h264_variable.mkv": _x264(_OPEN, variable=True),
  "h264_late_start.mp4": _x264(_PYRAMID, first_stamp=900),
  "h264_late_start.ts": _x264(_PYRAMID, first_stamp=900),
  "h264_edited.mp4": _x264(_OPEN, first_stamp=-17, counts_on=False),
  "h264_fragments.mp4": _x264(_PYRAMID, muxer=_FRAGMENTS),
  "h264_live.mkv": _x264(_PYRAMID, muxer={"live": "1"}),
  "h264.flv": _x264(_PYRAMID),
  "h264.avi": _x264(_GROUPS + ":bframes=0"),
  "h264_b_frames.avi": _x264(_PYRAMID),
  "h264_stream.h264": _x264(_PYRAMID),
  "hevc.mp4": _x265("keyint=12:bframes=3"),
  "hevc_open_groups.mkv": _x265("keyint=12:min-keyint=1:bframes=3:open-gop=1"),
  "hevc_open_groups.ts": _x265("keyint=12:min-keyint=1:bframes=4:b-pyramid=1:open-gop=1"),
  "hevc_temporal_layers.mp4": _x265("keyint=24:bframes=3:temporal-layers=3"),
  "hevc_10_bit.mov": _x265("keyint=12:open-gop=0", pixels="yuv420p10le"),
  "hevc_variable.mp4": _x265("keyint=12:open-gop=0:bframes=3", variable=True),
  "vp8.webm": Odd("libvpx", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
  "vp9.webm": _vp9(12),
  "vp9_hidden_frames.webm": Odd(
    "libvpx-vp9",
    {"deadline": "good", "cpu-used": "5", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "12"},
  ),
  "vp9_odd_size.mkv": _vp9(12, height=45, width=67),
  "vp9_live.webm": _vp9(12, muxer={"live": "1"}),
  "vp9_variable.webm": _vp9(15, variable=True),
  "vp9.mp4": _vp9(12),
  "av1.mp4": Odd("libsvtav1", {"preset": "12", "g": "20"}, height=64),
  "mpeg4.avi": Odd("mpeg4", _MPEG4),
  "mpeg4_b_frames.avi": Odd("mpeg4", _MPEG4_B),
  "mpeg4.mp4": Odd("mpeg4", _MPEG4_B),
  "mpeg4.mkv": Odd("mpeg4", _MPEG4_B),
  "mpeg2.ts": Odd("mpeg2video", _MPEG4_B),
  "mpeg2.mpg": Odd("mpeg2video", _MPEG4_B),
  "mpeg2_interlaced.mkv": Odd("mpeg2video", {**_MPEG4_B, "flags": "+ildct+ilme"}),
  "wmv2.wmv": Odd("wmv2", _MPEG4),
  "ffv1.mkv": Odd("ffv1", {"level": "3"}, height=45, width=67, pixels="yuv444p"),
  "mjpeg.avi": _ALL_INTRA,
  "mjpeg.mov": dataclasses.replace(_ALL_INTRA, variable=True),
  "mjpeg.mkv": dataclasses.replace(_ALL_INTRA, height=45, width=67),
  "picture.gif": Odd("gif", pixels="rgb8", fps=Fraction(10)),
  "picture_variable.gif": Odd("gif", pixels="rgb8", variable=True, height=45, width=67),
  "picture.png": Odd("apng", pixels="rgb24", fps=Fraction(10), num_frames=20),
}


def make_odd_video(path: Path) -> Odd:
  """Writes the file of ODD_VIDEOS that has this path's name."""
  odd = ODD_VIDEOS[path.name]
  muxer = dict(odd.muxer)
  format_name = "apng" if path.suffix == ".png" else None
  with av.open(str(path), "w", format=format_name, options=muxer) as container:
    stream = container.add_stream(odd.codec, rate=odd.fps, options=odd.options)
    stream.height, stream.width, stream.pix_fmt = odd.height, odd.width, odd.pixels
    if odd.variable:
      stream.codec_context.time_base = Fraction(1, 1000)
    if odd.rotation:
      stream.set_display_rotation(odd.rotation)
    reformatter = VideoReformatter()
    for picture, stamp in zip(_pictures(odd), _stamps(odd), strict=True):
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      frame = reformatter.reformat(frame, format=odd.pixels)
      frame.pts = stamp
      container.mux(_shifted(stream.encode(frame), odd))
    container.mux(_shifted(stream.encode(None), odd))
  return odd


def _pictures(odd: Odd):
  """Noise that moves, so that no two neighbours are alike."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 120, (odd.height, odd.width + 16, 3), dtype=np.uint8)
  for number in range(odd.num_frames):
    cut = noise[:, number % 16 : number % 16 + odd.width]
    yield np.roll(cut, number, axis=0) + np.uint8(number * 7 % 130)


def _stamps(odd: Odd) -> list[int]:
  if not odd.variable:
    return list(range(odd.num_frames))
  steps = random.Random(1).choices([20, 30, 40, 200, 1000], [8, 4, 2, 1, 1], k=odd.num_frames)
  return list(np.cumsum([0, *steps[1:]]))


def _shifted(packets, odd: Odd):
  for packet in packets:
    shift = round(odd.first_stamp / odd.fps / packet.time_base)
    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
  return packets
