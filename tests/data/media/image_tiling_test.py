"""Tiles of an image; the official grids, pixels and orders are in tests/parity/anyres_test.py."""

import numpy as np
import pytest

from videochat_flash_jax.data.media.image_tiling import (
  choose_grid,
  choose_resolution,
  cut_tiles,
  grid_resolutions,
  pad_to_square,
  sequence_order,
)
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import TilingConfig


def test_columns_and_rows_have_bounds_of_their_own():
  assert grid_resolutions(TilingConfig(2, 3), 10) == [
    (10, 10), (10, 20), (10, 30), (20, 10), (20, 20), (20, 30),
  ]  # fmt: skip


def test_a_budget_counts_the_base_view_and_always_leaves_one_tile():
  assert grid_resolutions(TilingConfig(2, 2), 10, max_pixels=300) == [(10, 10), (10, 20), (20, 10)]
  assert grid_resolutions(TilingConfig(2, 2), 10, max_pixels=0) == [(10, 10)]


@pytest.mark.parametrize(
  "size, expected",
  [
    ((448, 448), (1, 1)),
    ((449, 448), (2, 1)),
    ((1, 1), (1, 1)),
    ((10_000, 10), (6, 1)),
    ((10, 10_000), (1, 6)),
    ((100_000, 1), (1, 1)),  # no pixel of it is left in any grid
    ((896, 1344), (2, 3)),
    ((9000, 9000), (6, 6)),
  ],
)
def test_an_image_gets_the_grid_that_shows_most_of_it(size, expected):
  assert choose_grid(*size, TilingConfig(), 448) == expected


def test_the_first_of_equal_resolutions_is_chosen():
  assert choose_resolution(10, 10, [(10, 20), (20, 10)]) == (10, 20)
  assert choose_resolution(10, 10, [(20, 10), (10, 20)]) == (20, 10)


def test_tiles_are_the_stretched_image_row_by_row_after_the_base_view():
  image = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
  tiles = cut_tiles(image, columns=3, rows=2, tile_size=8)
  assert tiles.shape == (7, 8, 8, 3)
  np.testing.assert_array_equal(tiles[0], resize(image, 8))
  rows = [np.concatenate(tiles[1 + 3 * row : 4 + 3 * row], axis=1) for row in range(2)]
  np.testing.assert_array_equal(np.concatenate(rows), resize(image, (16, 24)))


def test_an_image_of_one_tile_has_a_base_view_too():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  np.testing.assert_array_equal(cut_tiles(image, 1, 1, 8), [image, image])


def test_the_grid_is_read_like_one_picture():
  assert sequence_order(2, 1, 4).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
  assert sequence_order(1, 2, 4).tolist() == list(range(12))


@pytest.mark.parametrize("tile_tokens, run", [(64, 8), (16, 4), (12, 4), (24, 6), (7, 7), (1, 1)])
def test_a_tile_is_a_raster_as_square_as_its_tokens_allow(tile_tokens, run):
  order = sequence_order(3, 2, tile_tokens)
  assert order.dtype == np.int32
  assert sorted(order) == list(range(7 * tile_tokens))
  first_rows = order[tile_tokens : tile_tokens + 3 * run].reshape(3, run)
  starts = tile_tokens * np.array([1, 2, 3])
  np.testing.assert_array_equal(first_rows, starts[:, None] + np.arange(run))


@pytest.mark.parametrize("height, width, top, left", [(3, 8, 2, 0), (8, 3, 0, 2), (5, 5, 0, 0)])
def test_an_image_stands_in_the_middle_of_its_square(height, width, top, left):
  image = np.random.default_rng(0).integers(200, 256, (height, width, 3), dtype=np.uint8)
  square = pad_to_square(image)
  assert square.shape == (max(height, width), max(height, width), 3)
  np.testing.assert_array_equal(square[top : top + height, left : left + width], image)
  outside = np.ones(square.shape[:2], bool)
  outside[top : top + height, left : left + width] = False
  assert (square[outside] == (123, 116, 103)).all()


def test_an_image_too_long_for_a_square_is_refused():
  with pytest.raises(InputError, match="60000 x 1 pixels"):
    pad_to_square(np.zeros((1, 60_000, 3), np.uint8))
