"""Watches frames: decodes, encodes and reads them at the same time.

Each stage has its thread, and few items wait between two of them. So frames never pile up, and
while one stage works on a group, the others work on those around it. On several hosts the caller
also encodes.

    frames ─► clips of 4 ─► [ a group of clips ] ─► visual tokens ─► [ 2 groups ] ─► caches
    thread 1: decode                thread 2: encode                     caller: read

If an error or Ctrl-C stops it, the whole clips that were read stay: the prefix can be asked about.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.media.ahead import Ahead
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import group_clips
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.shapes import Float, UInt8

LEAST_WINDOW = 32  # frames
_SINK_CLIPS = 4
_GROUPS_WAITING = 2
_LEAST_TEXT = 64  # tokens that are left free for a question and its answer
_TEXT_TOKENS = 512  # that a question and its answer may take, when we say how many frames fit


class Window(NamedTuple):
  """How much of an endless video is remembered: its first four clips, and the last ones.

  The first tokens get much attention from all others, whatever they are ("attention sinks"), so a
  model without them fails (StreamingLLM, Xiao et al. 2024). When a window is full, a quarter of it
  is forgotten at once: the oldest clips but the first four.

  Attributes:
    num_clips: the most clips to remember.
    clip_tokens: visual tokens of a clip.
  """

  num_clips: int
  clip_tokens: int

  def slide(self, prefix: Prefix) -> None:
    """Forgets clips of a prefix until the others fit into the window."""
    start = int(prefix.is_visual.argmax()) + _SINK_CLIPS * self.clip_tokens
    hop = max(1, self.num_clips // 4) * self.clip_tokens
    while prefix.is_visual.sum() > self.num_clips * self.clip_tokens:
      prefix.forget(start, hop)

  def remembered(self, num_frames: int, clip_frames: int, num_forgotten: int) -> np.ndarray:
    """Indices of the frames that are remembered.

    Args:
      num_frames: frames that were watched.
      clip_frames: of a clip.
      num_forgotten: visual tokens that were forgotten.
    """
    first = _SINK_CLIPS * clip_frames
    gap = num_forgotten // self.clip_tokens * clip_frames
    return np.delete(np.arange(num_frames), np.s_[first : first + gap])


def watch_frames(
  engine: Engine,
  prefix: Prefix,
  frames: Iterable[UInt8[np.ndarray, "S S 3"]],
  num_frames: int | None,
  window: Window | None = None,
  on_read: Callable[[int], object] = lambda num_frames: None,
) -> None:
  """Encodes frames, and reads their visual tokens behind those of a prefix.

  Args:
    engine: runs the model.
    prefix: what stands before the frames.
    frames: in whole clips.
    num_frames: how many they are; None if that is not known.
    window: how much is remembered; None for all.
    on_read: is called with the number of frames whenever some were read.

  Raises:
    InputError: a frame cannot be read, or the context of the model has no room for the frames.
  """
  vision = engine.config.vision
  with Ahead(group_clips(frames, vision.clip_frames), engine.group_size) as clips:
    read_groups(engine, prefix, engine.encode_groups(clips), num_frames, window, on_read)


def read_groups(
  engine: Engine,
  prefix: Prefix,
  groups: Iterable[Float[np.ndarray, "v D"]],
  num_frames: int | None,
  window: Window | None = None,
  on_read: Callable[[int], object] = lambda num_frames: None,
) -> None:
  """Reads groups of visual tokens behind those of a prefix; see `watch_frames`."""
  config = engine.config
  tokens_per_frame = config.clip_tokens / config.vision.clip_frames
  # Two threads could start their programs in another order than those of another host.
  is_alone = not engine.is_on_several_hosts
  ahead = Ahead(groups, _GROUPS_WAITING) if is_alone else contextlib.nullcontext(groups)
  with ahead as groups:
    if num_frames is not None and window is None:
      check_frames(config, prefix, num_frames)
      prefix.expect(round(num_frames * tokens_per_frame))
    for visual_tokens in groups:
      new_frames = round(len(visual_tokens) / tokens_per_frame)
      check_frames(config, prefix, new_frames)
      prefix.add_visual(visual_tokens)
      if window is not None:
        window.slide(prefix)
      on_read(new_frames)
    prefix.settle()


def check_frames(config: VideoChatFlashConfig, prefix: Prefix, num_frames: int) -> None:
  """Checks that a model's context has room for frames, and for a short question about them.

  Args:
    config: of the model.
    prefix: what stands before the frames.
    num_frames: in whole clips.

  Raises:
    InputError: it has not; says how many frames fit.
  """
  clip_frames, available = config.vision.clip_frames, config.decoder.max_positions
  more = num_frames // clip_frames * config.clip_tokens
  if prefix.num_tokens + more + _LEAST_TEXT <= available:
    return
  num_text = prefix.num_tokens - int(prefix.is_visual.sum())
  most = max(0, available - num_text - _TEXT_TOKENS) // config.clip_tokens * clip_frames
  raise InputError(
    f"{num_frames:,} frames are {more:,} tokens after {prefix.num_tokens:,} others, but the "
    f"context of {config.name} holds {available:,}: beside a question {most:,} frames fit in all. "
    "Give max_frames (--max-frames) or a window, or a longer context by context (--context) or "
    "yarn (--yarn)"
  )
