"""`vcflash bench length`: time and peak memory of the first answer, by the length of the video.

Every length is watched in a process of its own, since the peak of a process is that of all its
videos. Most of the memory of a short video is that of Python, JAX and the compiler. A stream that
is watched with a window should take the same time and memory however long it is.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.benchmarks.log_plot import Panel, log_plot
from videochat_flash_jax.benchmarks.long_videos import (
  NEW_TOKENS,
  QUESTIONS,
  ranked_dropout,
  small_chat,
  write_long_film,
)

FRAMES = 100, 1000, 10_000
STREAM, WINDOW = 50_000, 1000  # frames
SETTINGS = {"no dropout": None, "dropout": ranked_dropout(3)}
_MIB = 2**20


def run(
  frames: Sequence[int] = FRAMES, stream: int = STREAM, window: int = WINDOW
) -> dict[str, Any]:
  """Watches films of rising lengths with the tiny model, without and with dropout; and a stream.

  Args:
    frames: of each film.
    stream: frames of the stream.
    window: of the stream, in frames.
  """
  measured = {setting: {} for setting in SETTINGS}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "film.mp4"
    for count in frames:
      write_long_film(path, count)
      for setting in SETTINGS:
        measured[setting][str(count)] = _in_own_process("film", path, count, setting)
  return {
    "name": "length",
    "threads": usable_cores(),
    "settings": {setting: _with_ratio(found) for setting, found in measured.items()},
    "stream": _in_own_process("stream", stream, window),
  }


def summary(report: dict[str, Any]) -> str:
  """A report as text, with one line for each length and setting.

  length (2 threads): the first answer; peak memory of the process
    no dropout     10000 frames   42.1 s    812 MiB, of the cache 122 MiB
    no dropout     without its cache the longest takes 1.2 x the memory of the length before
    stream of 50000 frames, window of 1000: the last tenth takes 1.01 x the time and 1.02 x the
      memory of the first, 1.2 ms a clip
  """
  lines = [f"length ({report['threads']} threads): the first answer; peak memory of the process"]
  for setting, found in report["settings"].items():
    lines += [
      f"  {setting:<12}{count:>7} frames {each['seconds']:8.3g} s "
      f"{each['peak_bytes'] / _MIB:8.0f} MiB, of the cache {each['cache_bytes'] / _MIB:.0f} MiB"
      for count, each in found["frames"].items()
    ]
    lines.append(
      f"  {setting:<12}without its cache the longest takes {found['times_memory']:.2f} x the "
      "memory of the length before"
    )
  stream = report["stream"]
  lines.append(
    f"  stream of {stream['frames']} frames, window of {stream['window']}: the last tenth takes "
    f"{stream['times_seconds']:.2f} x the time and {stream['times_memory']:.2f} x the memory of "
    f"the first, {1000 * stream['seconds_per_clip'][-1]:.3g} ms a clip"
  )
  return "\n".join(lines)


def plot(report: dict[str, Any]) -> str:
  """A report as an SVG picture: time, and peak memory, over the number of frames."""

  def lines(field, unit):
    """A line for each setting."""
    return {
      setting: [(int(count), each[field] / unit) for count, each in found["frames"].items()]
      for setting, found in report["settings"].items()
    }

  caches = {f"cache, {name}": line for name, line in lines("cache_bytes", _MIB).items()}
  return log_plot(
    [
      Panel("first answer, seconds", "frames", lines("seconds", 1)),
      Panel("peak memory, MiB", "frames", lines("peak_bytes", _MIB) | caches),
    ]
  )


def measure_film(path: str, num_frames: str, setting: str) -> dict[str, float]:
  """Watches a film and asks, twice, as the first time compiles; in a process of its own.

  Args:
    path: of the film.
    num_frames: of it, in digits.
    setting: a key of `SETTINGS`.

  Returns:
    Seconds of the second time; the peak memory of this process, and what it was before the film;
    and the bytes of the keys and values of the video.
  """
  chat, video = small_chat(dropout=SETTINGS[setting]), None
  before = _peak_bytes()
  for _ in range(2):
    video = None  # frees its caches
    start = time.perf_counter()
    video = chat.watch(path, max_frames=int(num_frames), progress=False)
    video.ask(QUESTIONS[0], max_new_tokens=NEW_TOKENS)
    seconds = time.perf_counter() - start
  return {
    "seconds": seconds,
    "peak_bytes": _peak_bytes(),
    "peak_bytes_before": before,
    "cache_bytes": video.cache_bytes,
  }


def measure_stream(num_frames: str, window: str) -> dict[str, Any]:
  """Watches a stream of pictures with a window; in a process of its own.

  Args:
    num_frames: of the stream, in digits.
    window: the most frames to remember, in digits.

  Returns:
    For each tenth of the stream the seconds that a clip took, and the peak memory at its end.
  """
  chat, num_frames, window = small_chat(), int(num_frames), int(window)
  pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  marks = []  # time and peak memory whenever a tenth of the frames was asked for

  def frames(count) -> Iterator[np.ndarray]:
    """Gives the pictures again and again."""
    for index in range(count + 1):
      if index % (count // 10) == 0:
        marks.append((time.perf_counter(), _peak_bytes()))
      if index < count:
        yield pictures[index % len(pictures)]

  chat.watch(frames(2 * window), window=window, progress=False)  # compiles
  marks.clear()
  chat.watch(frames(num_frames), window=window, progress=False)
  times, peaks = np.array(marks).T
  clips = num_frames / chat.config.vision.clip_frames / 10
  seconds = np.diff(times) / clips
  return {
    "frames": num_frames,
    "window": window,
    "seconds_per_clip": seconds.tolist(),
    "peak_bytes": peaks[1:].astype(int).tolist(),
    "times_seconds": seconds[-1] / seconds[0],
    "times_memory": peaks[-1] / peaks[1],
  }


def _peak_bytes():
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _in_own_process(what, *arguments):
  """The result of `measure_film` or `measure_stream`."""
  command = [sys.executable, "-m", __name__, what, *map(str, arguments)]
  return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _with_ratio(found):
  """How much more memory the longest video takes than the one before it, without its cache."""
  *_, shorter, longest = found.values()
  without_cache = longest["peak_bytes"] - longest["cache_bytes"]
  return {"frames": found, "times_memory": without_cache / shorter["peak_bytes"]}


if __name__ == "__main__":
  measure = {"film": measure_film, "stream": measure_stream}[sys.argv[1]]
  print(json.dumps(measure(*sys.argv[2:])))
