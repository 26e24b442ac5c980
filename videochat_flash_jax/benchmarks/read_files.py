"""Writes films for benchmarks, and counts the frames that a reader must decode."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from videochat_flash_jax.data.media.video_timeline import read_timeline

_FPS = 30
_SCENE_FRAMES = 250  # encoded once; longer films repeat them


def write_film(
  path: Path, num_frames: int, height: int, width: int, key_frame_distance: int, fps: int = _FPS
):
  """Writes an H.264 mp4 with B-frames and closed groups of pictures.

  Only 250 frames are encoded (all frames, if the film has at most 600). Their packets are written
  again and again with later time stamps, so that a long film takes only a minute.

  Args:
    path: of the file.
    num_frames: a multiple of 250, or any number up to 600.
    height: in pixels.
    width: in pixels.
    key_frame_distance: in frames; a divisor of 250.
    fps: frames a second.
  """
  scene_frames = _SCENE_FRAMES if num_frames > 600 else num_frames
  scene = path.with_suffix(".scene.mp4")
  pictures = _moving_pictures(scene_frames, height, width)
  _encode(scene, pictures, height, width, key_frame_distance, fps)
  with av.open(str(scene)) as source, av.open(str(path), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    time_base = source.streams.video[0].time_base
    packets = [packet for packet in source.demux(video=0) if packet.size]
    contents = [
      (bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe)
      for packet in packets
    ]
    for shift in range(0, num_frames * packets[0].duration, scene_frames * packets[0].duration):
      for content, pts, dts, duration, is_key in contents:
        packet = av.Packet(content)
        packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_key
        packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
        target.mux(packet)
  scene.unlink()


def _encode(
  path: Path, pictures: Iterator[np.ndarray], height: int, width: int, distance: int, fps: int
):
  to_yuv = VideoReformatter()
  parameters = f"keyint={distance}:min-keyint={distance}:scenecut=0"
  with av.open(str(path), "w") as container:
    stream = container.add_stream(
      "libx264", rate=fps, options={"preset": "fast", "crf": "23", "x264-params": parameters}
    )
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    for picture in pictures:
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      container.mux(stream.encode(to_yuv.reformat(frame, format="yuv420p")))
    container.mux(stream.encode(None))


def _moving_pictures(num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
  """Frames [height, width, 3]: a moving view of a textured ground, three moving squares, noise."""
  rng = np.random.default_rng(0)
  tall, wide = height * 3 // 2, width * 3 // 2
  coarse = rng.integers(0, 256, (tall // 8, wide // 8, 3), dtype=np.uint8)
  ground = np.asarray(Image.fromarray(coarse).resize((wide, tall), Image.Resampling.BICUBIC))
  ground = ground // 2 + rng.integers(50, 74, ground.shape, dtype=np.uint8)
  grain = rng.integers(0, 8, (height + 32, width + 32, 3), dtype=np.uint8)
  side = height // 5
  for number in range(num_frames):
    top = int((tall - height) * (0.5 + 0.5 * np.cos(number / 55)))
    left = int((wide - width) * (0.5 + 0.5 * np.sin(number / 40)))
    picture = ground[top : top + height, left : left + width].copy()
    for card in range(3):
      y = int((height - side) * (0.5 + 0.5 * np.sin(number / 17 + 2 * card)))
      x = int((width - side) * (0.5 + 0.5 * np.cos(number / 23 + card)))
      picture[y : y + side, x : x + side] = ground[card * 20 :, ::-1][:side, :side]
    y, x = number * 13 % 32, number * 7 % 32
    yield picture + grain[y : y + height, x : x + width]


def frames_needed(path: Path, indices: np.ndarray) -> tuple[int, int]:
  """Counts the frames of an H.264 mp4 that must be decoded to read the frames `indices`.

  Returns:
    Two numbers. The first counts the picked frames and the reference frames decoded before them,
    from a key frame on: the fewest frames that a reader can decode. The second counts all frames
    from a key frame to the last picked frame of its run.
  """
  with av.open(str(path)) as container:
    timeline = read_timeline(container, container.streams.video[0], path)
  with av.open(str(path)) as container:
    packets = zip(timeline.frame_of_packet, container.demux(video=0), strict=True)
    coded = [(frame, _is_reference(bytes(packet))) for frame, packet in packets if packet.size]
  decode_index = {number: index for index, (number, _) in enumerate(coded)}
  needed = from_key_frame = 0
  for picks in timeline.segments(indices.tolist()):
    key = timeline.key_frames[timeline.key_before(picks[0])].frame
    run = coded[decode_index[key] : max(decode_index[pick] for pick in picks) + 1]
    from_key_frame += len(run)
    needed += sum(is_reference or number in picks for number, is_reference in run)
  return needed, from_key_frame


def _is_reference(packet: bytes) -> bool:
  """Whether other frames may be predicted from this frame: nal_ref_idc of its H.264 slices."""
  start = 0
  while start < len(packet):  # each unit comes after 4 bytes with its length
    length = int.from_bytes(packet[start : start + 4])
    header = packet[start + 4]
    if header & 31 in (1, 5):  # a slice
      return header >> 5 & 3 > 0
    start += 4 + length
  return False
