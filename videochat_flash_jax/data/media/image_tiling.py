"""Cuts images into square tiles of the encoder's size, and gives the order of their tokens.

A single image is stretched to a grid of tiles. There is no padding, and the aspect ratio is not
kept. A base view, which is the whole image in one tile, comes before the tiles. If there are
several images, each is padded to a square and becomes one tile. The rules are those of the original
(`anyres_nopad` and `pad`).

  an image of 1280 x 720 pixels, tiles of 448   ->   3 x 2 tiles and the base view: 7 x 64 tokens
"""

import math
from collections.abc import Iterable

import numpy as np

from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import PIXEL_MEAN, TilingConfig

_PADDING_COLOUR = tuple(int(255 * mean) for mean in PIXEL_MEAN)
_LONGEST_SIDE = 1 << 14  # pixels; a limit, because the whole square is kept in memory


def grid_resolutions(
  tiling: TilingConfig, tile_size: int, max_pixels: int | None = None
) -> list[tuple[int, int]]:
  """Lists all sizes (width, height) in pixels that an image may be stretched to.

  There is one size for each number of columns and each number of rows; the rows vary fastest. A
  grid of several tiles is left out if it has more than `max_pixels` together with its base view.
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
  """Returns the size (width, height) that shows the most of an image, with the least waste.

  The image is fitted into a size without stretching. The pixels that it then fills are shown, but
  never more than the image has itself; the other pixels of the size are wasted. The size that shows
  the most pixels wins, then the one that wastes the fewest, then the first one.

      480 x 640 into 448 x 896: fitted 448 x 597, shows 267,456 pixels, wastes 133,952
                into 896 x 896: fitted 672 x 896, shows 307,200 (all it has), wastes 495,616
  """

  def shown_and_unwasted(resolution):
    """Returns the sort key of a size: its shown pixels, then its wasted pixels times -1."""
    scale = min(resolution[0] / width, resolution[1] / height)
    shown = min(int(width * scale) * int(height * scale), width * height)
    return shown, shown - resolution[0] * resolution[1]

  return max(resolutions, key=shown_and_unwasted)


def choose_grid(width: int, height: int, tiling: TilingConfig, tile_size: int) -> tuple[int, int]:
  """Returns how many columns and rows of tiles an image of this size is stretched to."""
  chosen = choose_resolution(width, height, grid_resolutions(tiling, tile_size))
  return chosen[0] // tile_size, chosen[1] // tile_size


def cut_tiles(image: np.ndarray, columns: int, rows: int, tile_size: int) -> np.ndarray:
  """Returns the base view of an image, then its tiles, row by row.

  Args:
    image: uint8 `[H, W, 3]`, of any size.
    columns: number of tiles in each row of the grid.
    rows: number of rows of the grid.
    tile_size: S, side of a tile in pixels.

  Returns:
    uint8 `[1 + rows * columns, S, S, 3]`. A grid of one tile also has a base view before it.
  """
  stretched = resize(image, (rows * tile_size, columns * tile_size))
  tiles = stretched.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
  return np.concatenate([resize(image, tile_size)[None], tiles.reshape(-1, *tiles.shape[2:])])


def sequence_order(columns: int, rows: int, tile_tokens: int) -> np.ndarray:
  """Returns the order in which the tokens of `cut_tiles`' tiles stand in the sequence.

  The base view comes first. Then the grid is read like one picture. The tokens of each tile count
  as a rectangle, as square as their number allows (64 are 8 x 8), and a row of this rectangle
  continues in the tile to its right. Merged tokens have no two-dimensional order, but the released
  weights were trained in this way.

      2 columns, 1 row, 4 tokens a tile: base view 0-3, left tile 4-7, right tile 8-11
      order                              0 1 2 3   4 5 8 9   6 7 10 11

  Returns:
    int32 `[(1 + rows * columns) * tile_tokens]`, indices of the encoder's output tokens.
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
      "scale it down, crop it, or ask about it without other images"
    )
  square = np.full((side, side, 3), _PADDING_COLOUR, np.uint8)
  top, left = (side - height) // 2, (side - width) // 2
  square[top : top + height, left : left + width] = image
  return square
