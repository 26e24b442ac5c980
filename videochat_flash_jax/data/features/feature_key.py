"""What features depend on, and the keys of the videos and images that they were made from.

A feature store belongs to one encoder, which `FeatureKey` describes. An entry of the store is found
by the content of a file and by the chosen frames. So the file may be moved or renamed.
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

# Raise it with every change that gives other pixels: in the video reader, in the preprocessing, or
# in the tiling of images. Older features are then rejected.
PREPROCESSING_VERSION = 1
_NUM_BLOCKS, _BLOCK_BYTES = 16, 1 << 16  # the parts of a file that are read for its digest


@dataclasses.dataclass(frozen=True)
class FeatureKey:
  """What features depend on, besides the frames themselves.

  Attributes:
    vision: sizes of the encoder.
    clip_tokens: the most tokens that a clip is merged to.
    merge_heads: number of heads over which merging measures the similarity of tokens.
    dtype: dtype of the computation, such as "bfloat16".
    weights: digest of the encoder's weights, from `weights_digest`.
    preprocessing: `PREPROCESSING_VERSION` of the program that made the features.
  """

  vision: VisionConfig
  clip_tokens: int
  merge_heads: int
  dtype: str
  weights: str
  preprocessing: int = PREPROCESSING_VERSION

  @classmethod
  def of(cls, config: VideoChatFlashConfig, dtype: str, weights: str) -> "FeatureKey":
    """Returns the key of a model's encoder; see the attributes."""
    connector = config.connector
    return cls(config.vision, connector.clip_tokens, connector.merge_heads, dtype, weights)

  def facts(self) -> dict[str, int | str]:
    """Returns all fields as a flat dict of JSON values, in the order in which they are compared."""
    facts = dataclasses.asdict(self)
    return facts.pop("vision") | facts

  @property
  def digest(self) -> str:
    """A digest that differs between different keys."""
    return _digest(json.dumps(self.facts()).encode()).hex()


def weights_digest(weights: Iterable[tuple[str, np.ndarray]]) -> str:
  """Returns a digest that differs between encoders with different weights.

  It is the SHA-256 of names, shapes and values. Values are converted to float32, so that weights
  which were released in bfloat16 have the same digest in both dtypes.

  Args:
    weights: names and arrays, in a fixed order; each is read once, and not kept.
  """
  total = hashlib.sha256()
  for name, array in weights:
    total.update(f"{name} {array.shape} ".encode())
    total.update(np.ascontiguousarray(array, np.float32))
  return total.hexdigest()


def file_digest(path: str | os.PathLike) -> bytes:
  """Returns a digest of a file: 16 bytes from its size and 16 evenly spaced blocks of 64 KiB.

  A file of a megabyte or less is read completely. Two larger files have the same digest only if
  they have the same size and the same blocks. This suffices for videos: the index of a video, at
  its start or end, holds the size of every frame. So a file that was copied or renamed is
  recognised, and hours of video cost milliseconds.

  Raises:
    InputError: as in `files.open_media`.
    OSError: the file cannot be read.
  """
  return _file_digest(str(path), file_stamp(path))


@functools.lru_cache(1024)
def _file_digest(path, stamp):
  media = open_media(path)
  with media if is_address(path) else open(media, "rb") as file:
    size = file.seek(0, os.SEEK_END)
    last_start = max(size - _BLOCK_BYTES, 0)
    parts = [str(size).encode()]
    for block in range(_NUM_BLOCKS):
      start = last_start * block // (_NUM_BLOCKS - 1)
      if size <= _NUM_BLOCKS * _BLOCK_BYTES:
        start = block * _BLOCK_BYTES
      file.seek(start)
      parts.append(file.read(_BLOCK_BYTES))
  return _digest(*parts)


def frames_entry(path: str | os.PathLike, indices: Sequence[int] | np.ndarray) -> bytes:
  """Returns the key of a video's clips in a feature store: 16 bytes.

  Args:
    path: of a video file, or of a folder of pictures, of which only the chosen ones are read.
    indices: indices of the chosen frames, in order, integers `[T]`.

  Raises:
    InputError: as in `files.open_media`.
    OSError: a file cannot be read.
  """
  if os.path.isdir(path):
    pictures = list_pictures(Path(path))
    return _digest(b"pictures", *(file_digest(pictures[index]) for index in indices))
  return _digest(b"frames", file_digest(path), np.asarray(indices, "<i8").tobytes())


def image_entry(image: np.ndarray, tiles: Sequence[int] | None) -> bytes:
  """Returns the key of an image's tiles in a feature store: 16 bytes.

  Args:
    image: uint8 `[H, W, 3]`, of its own size.
    tiles: columns and rows of tiles that it is cut into, None if it is padded to one square.
  """
  return _digest(b"image", json.dumps([image.shape, tiles]).encode(), image.tobytes())


def _digest(*parts: bytes) -> bytes:
  total = hashlib.blake2b(digest_size=16)
  for part in parts:
    total.update(len(part).to_bytes(8, "little"))
    total.update(part)
  return total.digest()
