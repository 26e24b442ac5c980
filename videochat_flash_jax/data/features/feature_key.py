"""What features depend on, and the names of what they were made from.

A store of features belongs to one encoder: `FeatureKey` says which. In it an entry is found by the
content of a file and the frames that were chosen, wherever the file lies, whatever it is called.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from videochat_flash_jax.data.media.files import file_stamp, is_address, open_media
from videochat_flash_jax.data.media.picture_folder import list_pictures
from videochat_flash_jax.models.config import VideoChatFlashConfig, VisionConfig

# To be raised with every change of what the reader of a video makes of it, or `preprocessing`, or
# the tiling of images: older features are then refused.
PREPROCESSING_VERSION = 1
_NUM_BLOCKS, _BLOCK_BYTES = 16, 1 << 16  # of a file are looked at


@dataclasses.dataclass(frozen=True)
class FeatureKey:
  """What makes features, besides the frames themselves.

  Attributes:
    vision: sizes of the encoder.
    clip_tokens: V, to which the tokens of a clip are merged.
    merge_heads: heads over which their likeness is measured.
    dtype: of the computation, such as "bfloat16".
    weights: of the encoder, from `weights_digest`.
    preprocessing: `PREPROCESSING_VERSION` of the program.
  """

  vision: VisionConfig
  clip_tokens: int
  merge_heads: int
  dtype: str
  weights: str
  preprocessing: int = PREPROCESSING_VERSION

  @classmethod
  def of(cls, config: VideoChatFlashConfig, dtype: str, weights: str) -> "FeatureKey":
    """The key of a model's encoder; see the attributes."""
    connector = config.connector
    return cls(config.vision, connector.clip_tokens, connector.merge_heads, dtype, weights)

  def facts(self) -> dict[str, int | str]:
    """All fields, flat and fit for JSON, in the order in which they are compared."""
    facts = dataclasses.asdict(self)
    return facts.pop("vision") | facts

  @property
  def digest(self) -> str:
    """Tells keys apart."""
    return _digest(json.dumps(self.facts()).encode()).hex()


def weights_digest(weights: Iterable[tuple[str, np.ndarray]]) -> str:
  """Tells the weights of encoders apart: a SHA-256 over names, shapes and values.

  Values count as float32, so that weights which were released in bfloat16 are the same in both.

  Args:
    weights: names and arrays, in a fixed order; each is looked at once, and not kept.
  """
  total = hashlib.sha256()
  for name, array in weights:
    total.update(f"{name} {array.shape} ".encode())
    total.update(np.ascontiguousarray(array, np.float32))
  return total.hexdigest()


def file_digest(path: str | os.PathLike) -> bytes:
  """Tells files apart: 16 bytes from the size and 16 blocks of 64 KiB, spread evenly.

  A file of a megabyte or less is read whole. Two larger ones count as the same only if they agree
  in size and in all blocks; the index of a video, at its start or end, holds the size of every
  frame. So a file that was copied or renamed is known again, and hours of video cost milliseconds.

  Raises:
    InputError: as `media_files.open_media`.
    OSError: the file cannot be read.
  """
  return _file_digest(str(path), file_stamp(path))


@functools.lru_cache(1024)
def _file_digest(path, stamp):
  media = open_media(path)
  with media if is_address(path) else open(media, "rb") as file:
    size = file.seek(0, os.SEEK_END)
    last = max(size - _BLOCK_BYTES, 0)
    parts = [str(size).encode()]
    for place in range(_NUM_BLOCKS):
      start = last * place // (_NUM_BLOCKS - 1)
      if size <= _NUM_BLOCKS * _BLOCK_BYTES:
        start = place * _BLOCK_BYTES
      file.seek(start)
      parts.append(file.read(_BLOCK_BYTES))
  return _digest(*parts)


def frames_entry(path: str | os.PathLike, indices: Sequence[int] | np.ndarray) -> bytes:
  """The name of the clips of a video: 16 bytes.

  Args:
    path: of a video file, or of a folder of pictures, of which those chosen are looked at.
    indices: of the frames, in order.

  Raises:
    InputError: as `media_files.open_media`.
    OSError: a file cannot be read.
  """
  if os.path.isdir(path):
    pictures = list_pictures(Path(path))
    return _digest(b"pictures", *(file_digest(pictures[index]) for index in indices))
  return _digest(b"frames", file_digest(path), np.asarray(indices, "<i8").tobytes())


def image_entry(image: np.ndarray, tiles: Sequence[int] | None) -> bytes:
  """The name of an image's tiles: 16 bytes.

  Args:
    image: uint8 `[H, W, 3]`, of its own size.
    tiles: columns and rows into which it is cut, None if it is padded to one square.
  """
  return _digest(b"image", json.dumps([image.shape, tiles]).encode(), image.tobytes())


def _digest(*parts: bytes) -> bytes:
  total = hashlib.blake2b(digest_size=16)
  for part in parts:
    total.update(len(part).to_bytes(8, "little"))
    total.update(part)
  return total.digest()
