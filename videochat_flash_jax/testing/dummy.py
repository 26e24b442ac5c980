"""A small model with random weights, a checkpoint of it, and a video of coloured blocks."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import jax
import numpy as np
from flax import nnx

from videochat_flash_jax.checkpoints.convert import save_model
from videochat_flash_jax.data.text.tokenizer import train_sentencepiece
from videochat_flash_jax.models.config import ConnectorConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

_SENTENCES = [
  "You are a helpful assistant.",
  "The video lasts for 12.00 seconds, and 12 frames are uniformly sampled from it.",
  "What colour is the star? Which one moves, and where does it go?",
]


def dummy_config() -> VideoChatFlashConfig:
  """The parts of the tiny model in sizes that compile fast; some source tokens are not merged."""
  tiny = VideoChatFlashConfig.tiny()
  return dataclasses.replace(
    tiny,
    name="dummy",
    vision=dataclasses.replace(
      tiny.vision,
      image_size=32,
      patch_size=8,
      position_grid=4,
      width=32,
      num_heads=4,
      depth=2,
      mlp_width=64,
    ),
    connector=ConnectorConfig(clip_tokens=12, merge_heads=4),
    decoder=dataclasses.replace(
      tiny.decoder,
      vocab_size=512,
      width=48,
      depth=3,
      num_heads=4,
      num_kv_heads=2,
      head_size=16,
      mlp_width=96,
      max_positions=2048,
    ),
  )


def dummy_model(config: VideoChatFlashConfig | None = None, seed: int = 0) -> VideoChatFlash:
  """A model in which every weight is random, so that no zero bias or unit scale hides a mistake."""
  model = VideoChatFlash(config or dummy_config(), rngs=nnx.Rngs(seed))
  graph, state = nnx.split(model)
  leaves, treedef = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noisy = [
    leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return nnx.merge(graph, treedef.unflatten(noisy))


def write_dummy_checkpoint(
  directory: Path, config: VideoChatFlashConfig | None = None, seed: int = 0
) -> Path:
  """Writes a complete checkpoint (weights, config, tokenizer) and returns its directory."""
  config = config or dummy_config()
  save_model(dummy_model(config, seed), config, directory)
  train_sentencepiece(_SENTENCES, directory / "tokenizer.model")
  return directory


def write_dummy_video(
  path: Path, num_frames: int = 24, fps: int = 2, size: tuple[int, int] = (48, 64), seed: int = 0
) -> Path:
  """Writes an H.264 video of moving coloured blocks and returns its path.

  Args:
    path: of the file.
    num_frames: number of frames.
    fps: frames per second.
    size: (height, width) in pixels.
    seed: of the colours.
  """
  height, width = size
  blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
  picture = np.kron(blocks, np.ones((height // 6, width // 8, 1), np.uint8))
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = "yuv420p"
    for shift in range(num_frames):
      frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * shift, axis=1), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path
