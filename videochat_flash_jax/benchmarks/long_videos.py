"""What the benchmarks of long videos share: films of hours, and small models to watch them."""

import dataclasses
from pathlib import Path

from flax import nnx

from videochat_flash_jax.benchmarks.comparison import random_weights
from videochat_flash_jax.benchmarks.read_files import write_film
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.checkpoints.runs.run_files import hub_files
from videochat_flash_jax.data.text.tokenizer import load_tokenizer
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

NEW_TOKENS = 8  # of an answer, at most: the time of a question is asked for, not of an essay
_CONTEXT = 200_000
_HEIGHT, _WIDTH, _KEY_FRAME_DISTANCE = 240, 320, 250
_COLOURS = "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"
QUESTIONS = tuple(f"Is there a {colour} star in the video?" for colour in _COLOURS)


def write_long_film(path: Path, num_frames: int):
  """Writes a film of one frame a second; the number of frames is that of `write_film`."""
  write_film(path, num_frames, _HEIGHT, _WIDTH, _KEY_FRAME_DISTANCE, fps=1)


def ranked_dropout(layer: int) -> DropoutConfig:
  """As `DropoutConfig.model_card`, for few layers: the drop by attention is before `layer`."""
  return DropoutConfig("uniform0_attention", layers=(1, layer), ratios=(1.0, 0.75, 0.25))


def small_chat(depth: int | None = None, dropout: DropoutConfig | None = None) -> VideoChat:
  """The tiny model with room for a long video.

  Args:
    depth: layers of its decoder, with random weights; None for the model that ships, which has 4.
    dropout: None for none.
  """
  directory = checkpoint_directory("tiny")
  if depth is None:
    # Given as a directory, it does not warn that it knows nothing of these films.
    return VideoChat.from_pretrained(directory, context=_CONTEXT, dropout=dropout or False)
  tiny = VideoChatFlashConfig.tiny()
  decoder = dataclasses.replace(tiny.decoder, depth=depth, max_positions=_CONTEXT)
  config = dataclasses.replace(tiny, decoder=decoder, dropout=dropout)
  model = nnx.merge(*random_weights(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0))))
  return VideoChat(model, load_tokenizer(hub_files(directory)))
