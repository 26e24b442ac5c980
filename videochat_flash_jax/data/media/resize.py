"""Resizes pictures for the encoder, on the host.

The rest of the preparation, `(x / 255 - mean) / std`, is done on the device, so that frames are
sent to it as uint8: see `normalise_pixels` in `models/videochat_flash.py`.
"""

import numpy as np
from PIL import Image


def resize(pictures: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
  """Resizes pictures directly to the given size, without a crop; the aspect ratio is not kept.

  The resize is Pillow's bicubic one with antialiasing, in uint8. The width is resized first, then
  the height. This is bit for bit what the released weights were trained on.

  Args:
    pictures: uint8 `[..., H, W, 3]`, or one gray picture `[H, W]`, which becomes RGB.
    image_size: side of a square, or (height, width), in pixels.

  Returns:
    uint8 `[..., height, width, 3]`.
  """
  height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
  if pictures.ndim == 2:
    pictures = np.repeat(pictures[..., None], 3, axis=-1)
  resized = np.empty((*pictures.shape[:-3], height, width, 3), np.uint8)
  for index in np.ndindex(pictures.shape[:-3]):
    picture = Image.fromarray(pictures[index])
    # Two calls, because the result depends on the order of the two passes, which Pillow 13 changed.
    picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    resized[index] = picture.resize((width, height), Image.Resampling.BICUBIC)
  return resized
