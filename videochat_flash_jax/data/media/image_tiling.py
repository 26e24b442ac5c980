"""Images as square tiles of the encoder's size: how many, which pixels, and in which order.

A single image is stretched to a grid of tiles (no padding, the aspect ratio is not kept), and a
base view, the whole image in one tile, goes before them. Of several images each is padded to a
square and becomes one tile. The rules are those of the original (`anyres_nopad` and `pad`).

  an image of 1280 x 720 pixels, tiles of 448   ->   3 x 2 tiles and the base view: 7 x 64 tokens
"""

import math
from collections.abc import Iterable

import numpy as np

from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import PIXEL_MEAN, TilingConfig

_PADDING_COLOUR = tuple(int(255 * mean) for mean in PIXEL_MEAN)
_LONGEST_SIDE = 1 << 14  # pixels; the square is held in memory


def grid_resolutions(
  tiling: TilingConfig, tile_size: int, max_pixels: int | None = None
) -> list[tuple[int, int]]:
  """All sizes (width, height) in pixels that an image may be stretched to.

  Every number of columns with every number of rows, rows counting faster. Grids of several tiles
  that exceed `max_pixels` together with their base view are left out.
  """
  grids = [
    (columns, rows)
    for columns in range(1, tiling.max_columns + 1)
    for rows in range(1, tiling.max_rows + 1)
    if max_pixels is None
    or columns * rows == 1
    or (columns * rows + 1) * tile_size**2 <= max_pixels
  ]
  return [(columns * tile_size, rows * tile_size) for columns, rows in grids]


def choose_resolution(
  width: int, height: int, resolutions: Iterable[tuple[int, int]]
) -> tuple[int, int]:
  """The size (width, height) that shows most of an image, and of those the one with least waste.

  An image that is fitted into a size without stretching fills some of its pixels; it shows at
  most as many as it has itself, and the rest of the size is waste. The first of equals wins.

      480 x 640 into 448 x 896: fitted 448 x 597, shows 267,456 pixels, wastes 133,952
                into 896 x 896: fitted 672 x 896, shows 307,200 (all it has), wastes 495,616
  """

  def shown_and_saved(resolution):
    scale = min(resolution[0] / width, resolution[1] / height)
    shown = min(int(width * scale) * int(height * scale), width * height)
    return shown, shown - resolution[0] * resolution[1]

  return max(resolutions, key=shown_and_saved)


def choose_grid(width: int, height: int, tiling: TilingConfig, tile_size: int) -> tuple[int, int]:
  """How many columns and rows of tiles an image of this size is stretched to."""
  chosen = choose_resolution(width, height, grid_resolutions(tiling, tile_size))
  return chosen[0] // tile_size, chosen[1] // tile_size


def cut_tiles(image: np.ndarray, columns: int, rows: int, tile_size: int) -> np.ndarray:
  """The base view of an image, then its tiles, row by row.

  Args:
    image: uint8 `[H, W, 3]`, of any size.
    columns: tiles side by side.
    rows: tiles one below the other.
    tile_size: S, side of a tile in pixels.

  Returns:
    uint8 `[1 + rows * columns, S, S, 3]`; even a grid of one tile has a base view beside it.
  """
  stretched = resize(image, (rows * tile_size, columns * tile_size))
  tiles = stretched.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
  return np.concatenate([resize(image, tile_size)[None], tiles.reshape(-1, *tiles.shape[2:])])


def sequence_order(columns: int, rows: int, tile_tokens: int) -> np.ndarray:
  """The order in which the tokens of `cut_tiles`' tiles stand in the sequence.

  The base view comes first. Then the grid is read like one picture: each tile counts as a raster
  of tokens, as square as their number allows (64 are 8 x 8), and its rows run on into those of
  the next tile. Merged tokens lie in no raster, but the released weights were trained so.

      2 columns, 1 row, 4 tokens a tile: base view 0-3, left tile 4-7, right tile 8-11
      order                              0 1 2 3   4 5 8 9   6 7 10 11

  Returns:
    int32 `[(1 + rows * columns) * tile_tokens]`, indices among the encoder's outputs.
  """
  height = next(n for n in range(math.isqrt(tile_tokens), 0, -1) if tile_tokens % n == 0)
  order = np.arange((1 + rows * columns) * tile_tokens, dtype=np.int32)
  base, tiles = np.split(order, [tile_tokens])
  tiles = tiles.reshape(rows, columns, height, tile_tokens // height).swapaxes(1, 2)
  return np.concatenate([base, tiles.ravel()])


def pad_to_square(image: np.ndarray) -> np.ndarray:
  """Centres an image uint8 `[H, W, 3]` in a square of the encoders' mean colour.

  Raises:
    InputError: a side is longer than 16,384 pixels.
  """
  height, width = image.shape[:2]
  side = max(height, width)
  if side > _LONGEST_SIDE:
    raise InputError(
      f"an image of {width} x {height} pixels is too long to be padded to a square; "
      "scale it down, crop it, or look at it alone"
    )
  square = np.full((side, side, 3), _PADDING_COLOUR, np.uint8)
  top, left = (side - height) // 2, (side - width) // 2
  square[top : top + height, left : left + width] = image
  return square
