"""`vcflash bench watch`: a video from its file to the caches, beside each of its stages alone.

The stages are decoding, encoding and reading. If they overlap, watching takes as long as the
slowest of them. But on a CPU they share its cores: it takes no less than the CPU time of all of
them, spread over all cores.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.benchmarks.long_videos import small_chat, write_long_film
from videochat_flash_jax.benchmarks.prefill import prefix_work
from videochat_flash_jax.data.media.open_source import open_source
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.feature_encoding import group_clips
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.inference.watching import read_groups

FRAMES = 1250, 2500, 5000, 10_000
STAGES = "decode", "encode", "read"


def run(frames: Sequence[int] = FRAMES, repeats: int = 1) -> dict[str, Any]:
  """Watches a film of each number of frames, with the tiny model and without dropout."""
  chat = small_chat()
  with tempfile.TemporaryDirectory() as folder:
    measured = {
      count: _measure(chat, Path(folder) / "film.mp4", count, repeats) for count in frames
    }
  tokens_per_frame = chat.config.clip_tokens / chat.config.vision.clip_frames
  of_reading = [prefix_work(chat.config.decoder, n * tokens_per_frame).flops for n in frames]
  exponents = {
    way: exponent(frames, [found["seconds"][way] for found in measured.values()])
    for way in ("watch", *STAGES)
  }
  return {
    "name": "watch",
    "threads": usable_cores(),
    "repeats": repeats,
    "frames": {str(count): found for count, found in measured.items()},
    "exponents": exponents | {"flops_of_read": exponent(frames, of_reading)},
  }


def summary(report: dict[str, Any]) -> str:
  """A report as text, with one line for each number of frames.

  watch (2 threads): seconds; alone: decode, encode, read
    10000 frames   41.2 s   1.06 x the slowest stage (38.9 s: read)   alone: 7.1, 5.2, 38.9 s
      0.80 x all stages one after another   1.06 x the least on these cores (38.9 s)
  time grows as frames to the power of: watch 1.54, decode 1.00, encode 1.01, ...
  """
  lines = [f"watch ({report['threads']} threads): seconds; alone: {', '.join(STAGES)}"]
  for count, found in report["frames"].items():
    seconds = found["seconds"]
    alone = ", ".join(f"{seconds[stage]:.3g}" for stage in STAGES)
    slowest = found["slowest"]
    lines += [
      f"  {count} frames {seconds['watch']:8.3g} s   {found['times_slowest']:.2f} x the slowest "
      f"stage ({seconds[slowest]:.3g} s: {slowest})   alone: {alone} s",
      f"    {found['times_sum']:.2f} x all stages one after another   {found['times_least']:.2f} x "
      f"the least on these cores ({found['least_seconds']:.3g} s)",
    ]
  powers = ", ".join(f"{way} {power:.2f}" for way, power in report["exponents"].items())
  return "\n".join([*lines, f"  time grows as frames to the power of: {powers}"])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
  """The power p of `values = c * sizes ** p` that fits best; 1 if they grow in proportion."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _measure(chat: VideoChat, path: Path, num_frames: int, repeats: int) -> dict[str, Any]:
  """Times watching and each stage in turns; the first round compiles and does not count."""
  write_long_film(path, num_frames)
  ways = _ways(chat, path, num_frames)
  wall, busy = ({way: [] for way in ways} for _ in range(2))
  for _ in range(repeats + 1):
    for way, work in ways.items():
      start, busy_start = time.perf_counter(), time.process_time()
      jax.block_until_ready(work())
      wall[way].append(time.perf_counter() - start)
      busy[way].append(time.process_time() - busy_start)
  seconds, cpu_seconds = (
    {way: statistics.median(times[1:]) for way, times in of_ways.items()}
    for of_ways in (wall, busy)
  )
  alone = {stage: seconds[stage] for stage in STAGES}
  slowest = max(alone, key=alone.get)
  least = max(alone[slowest], sum(cpu_seconds[stage] for stage in STAGES) / usable_cores())
  return {
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "slowest": slowest,
    "times_slowest": seconds["watch"] / alone[slowest],
    "times_sum": seconds["watch"] / sum(alone.values()),
    "least_seconds": least,
    "times_least": seconds["watch"] / least,
  }


def _ways(chat: VideoChat, path: Path, num_frames: int) -> Mapping[str, Callable[[], object]]:
  """Watching, and each stage alone: it gets all that the stage before has made, in memory."""
  engine, vision = chat.engine, chat.config.vision
  made = {}

  def decode():
    """Decodes and resizes all frames."""
    sampling = chat.config.sampling
    with open_source(path, sampling=sampling, max_frames=num_frames) as source:
      made["frames"] = list(source.frames(vision.image_size))

  def encode():
    """Encodes all clips."""
    clips = group_clips(made["frames"], vision.clip_frames)
    made["groups"] = list(engine.encode_groups(clips))

  def read():
    """Reads all visual tokens."""
    prefix = Prefix(engine)
    read_groups(engine, prefix, made["groups"], num_frames)
    return prefix.caches

  def watch():
    """Does all of it, as a user does."""
    chat.watch(path, max_frames=num_frames, progress=False)

  return {"decode": decode, "encode": encode, "read": read, "watch": watch}
