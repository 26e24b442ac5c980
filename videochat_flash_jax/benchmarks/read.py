"""`vcflash bench read`: reads a few frames of a video; compared with full decoding and decord."""

import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.benchmarks.read_files import frames_needed, write_film
from videochat_flash_jax.data.media import video_reader
from videochat_flash_jax.data.media.frame_sampling import interval_indices
from videochat_flash_jax.data.media.resize import resize

IMAGE_SIZE = 224


class Film(NamedTuple):
  """A video file, and how it is read.

  Attributes:
    num_frames: frames of the file.
    height: in pixels.
    width: in pixels.
    key_frame_distance: in frames.
    picks: number of evenly spaced frames to read.
    repeats: number of measurements.
  """

  num_frames: int
  height: int
  width: int
  key_frame_distance: int
  picks: int
  repeats: int


FILMS = {
  "10 min 1080p, key 250": Film(18_000, 1080, 1920, 250, picks=64, repeats=1),
  "10 min 1080p, key 50": Film(18_000, 1080, 1920, 50, picks=64, repeats=1),
  "8 s 720p, 8 picks": Film(240, 720, 1280, 250, picks=8, repeats=5),
  "8 s 720p, 64 picks": Film(240, 720, 1280, 250, picks=64, repeats=5),
  "20 s 224p, 8 picks": Film(600, 224, 224, 250, picks=8, repeats=5),
  "20 s 224p, 64 picks": Film(600, 224, 224, 250, picks=64, repeats=5),
}


def run(films: dict[str, Film] = FILMS) -> dict[str, Any]:
  """Writes each film and reads it in three ways, in turns; the films are deleted afterwards."""
  peer, note = None, "no peer: pip install 'videochat_flash_jax[bench]'"
  if importlib.util.find_spec("decord"):
    peer, note = f"decord {importlib.metadata.version('decord')}", None
  with tempfile.TemporaryDirectory() as folder:
    measured = {
      name: _measure(film, Path(folder) / "film.mp4", with_decord=peer is not None)
      for name, film in films.items()
    }
  return {
    "name": "read",
    "threads": usable_cores(),
    "image_size": IMAGE_SIZE,
    "av": av.__version__,
    "peer": peer,
    "note": note,
    "films": measured,
  }


def summary(report: dict[str, Any]) -> str:
  """A report as text, with one line for each film.

  read (2 threads): seconds for the picked frames; peer: decord 0.6.0
    10 min 1080p, key 250       14.2 s    3.91 x full decoding (55.5 s)    3.2 x decord (45.4 s)
  """
  lines = [
    f"read ({report['threads']} threads): seconds for the picked frames; "
    + (f"peer: {report['peer']}" if report["peer"] else report["note"])
  ]
  for name, film in report["films"].items():
    line = f"  {name:<24}{film['seconds']:8.3g} s   "
    line += f"{film['times_full']:6.3g} x full decoding ({film['full_seconds']:.3g} s)"
    if film["decord_seconds"] is not None:
      line += f"   {film['times_decord']:6.3g} x decord ({film['decord_seconds']:.3g} s)"
    lines.append(line)
  return "\n".join(lines)


def _measure(film: Film, path: Path, with_decord: bool) -> dict[str, Any]:
  """Times all ways to read one film; the frames of `ours` and `full` must be equal."""
  write_film(path, film.num_frames, film.height, film.width, film.key_frame_distance)
  indices = interval_indices(film.num_frames, film.picks)
  ways: dict[str, Callable[[], object]] = {
    "ours": lambda: _read(path, indices),
    "full": lambda: _decode_everything(path, indices),
  }
  if with_decord:
    ways["decord"] = lambda: _read_with_decord(path, indices)
  elapsed = {way: [] for way in ways}
  busy = {way: [] for way in ways}  # seconds of all cores together
  results = {}
  for _ in range(film.repeats):
    for way, work in ways.items():
      start, busy_start = time.perf_counter(), time.process_time()
      results[way] = work()
      elapsed[way].append(time.perf_counter() - start)
      busy[way].append(time.process_time() - busy_start)
    ours, num_decoded = results["ours"]
    if not np.array_equal(ours, results["full"]):
      raise AssertionError(f"{path}: sparse reading and full decoding differ")
  seconds = {way: statistics.median(times) for way, times in elapsed.items()}
  needed, from_key_frame = frames_needed(path, indices)
  decord = seconds.get("decord")
  return {
    **film._asdict(),
    "megabytes": path.stat().st_size / 1e6,
    "seconds": seconds["ours"],
    "best_seconds": min(elapsed["ours"]),
    "frames_per_second": film.picks / seconds["ours"],
    "full_seconds": seconds["full"],
    "cpu_seconds": statistics.median(busy["ours"]),
    "full_cpu_seconds": statistics.median(busy["full"]),
    "times_full": seconds["full"] / seconds["ours"],
    "decord_seconds": decord,
    "times_decord": decord and decord / seconds["ours"],
    "frames_decoded": num_decoded,
    "frames_needed": needed,
    "frames_from_key_frame_to_pick": from_key_frame,
    "decoded_of_needed": num_decoded / needed,
  }


def _read(path: Path, indices: np.ndarray) -> tuple[np.ndarray, int]:
  """Reads frames with our reader; also returns how many frames were decoded for them."""
  video_reader.known_files.clear()  # as if the file were opened for the first time
  with video_reader.open_video(path) as video:
    return video.read(indices, IMAGE_SIZE), video.num_decoded


def _decode_everything(path: Path, indices: np.ndarray) -> np.ndarray:
  """Decodes all frames in one pass, and converts and resizes the picked ones."""
  wanted, to_rgb = set(indices.tolist()), VideoReformatter()

  def pictures() -> Iterator[np.ndarray]:
    """The picked frames [S, S, 3]."""
    with av.open(str(path)) as container:
      container.streams.video[0].thread_type = "AUTO"
      for number, frame in enumerate(container.decode(video=0)):
        if number in wanted:
          yield resize(to_rgb.reformat(frame, format="rgb24").to_ndarray(), IMAGE_SIZE)

  return np.stack(list(pictures()))


def _read_with_decord(path: Path, indices: np.ndarray) -> np.ndarray:
  """Reads frames as the official implementation does, with decord's own number of threads.

  Decord also resizes the frames. Its result is not that of Pillow, but it is faster than our resize
  of its frames would be.
  """
  import decord

  video = decord.VideoReader(str(path), ctx=decord.cpu(0), height=IMAGE_SIZE, width=IMAGE_SIZE)
  return video.get_batch(indices.tolist()).asnumpy()
