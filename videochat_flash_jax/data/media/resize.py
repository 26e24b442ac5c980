"""Pictures on their way to the encoder: the resize, which happens on the host.

The other half, `(x / 255 - mean) / std`, runs on the device, so that frames travel as uint8:
`normalise_pixels` in `models/videochat_flash.py`.
"""

import numpy as np
from PIL import Image


def resize(pictures: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
  """Resizes pictures straight to the size given: no crop, the aspect ratio is not kept.

  Bicubic and antialiased as Pillow does it, in uint8: this is what the released weights were
  trained on, bit for bit.

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
  for position in np.ndindex(pictures.shape[:-3]):
    picture = Image.fromarray(pictures[position])
    resized[position] = picture.resize((width, height), Image.Resampling.BICUBIC)
  return resized
