"""Images as tiles, golden family 09 and the layouts of family 06: grids, pixels and orders."""

import collections
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import Golden, assert_close
from videochat_flash_jax.data.media.image_tiling import (
  choose_grid,
  choose_resolution,
  cut_tiles,
  grid_resolutions,
  pad_to_square,
  sequence_order,
)
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.models.config import PIXEL_MEAN, PIXEL_STD, TilingConfig
from videochat_flash_jax.models.videochat_flash import normalise_pixels

FAMILY = Golden("09_anyres")
GRIDS = FAMILY.json("grids.json")
MANIFEST = FAMILY.json()
CROPS = {row["image"].removesuffix("_u8"): row for row in MANIFEST["crops"]}
PIXEL_TOLERANCE = 1e-6  # absolute
TILE_SIZES = {row["best_resolution_wh"][0] // row["grid_wh"][0] for row in CROPS.values()}


def range_by_default():
  """The range of rows that name none: the official default, or the one that most rows name."""
  named = collections.Counter(row["pinpoints"] for row in GRIDS["rows"])
  official = "(1x1),...,(6x6)"
  return official if official in named else named.most_common(1)[0][0]


def resolutions_of(pinpoints, tile_size, max_pixels=None):
  """Sizes that `(1x1),...,(WxH)` or a written list of pixels allows."""
  if pinpoints.startswith("["):
    return [tuple(size) for size in json.loads(pinpoints)]
  columns, rows = map(int, re.findall(r"\((\d+)x(\d+)\)", pinpoints)[-1])
  return grid_resolutions(TilingConfig(columns, rows), tile_size, max_pixels)


@pytest.mark.parametrize("pinpoints", sorted({row["pinpoints"] for row in GRIDS["rows"]}))
def test_grids_agree(pinpoints):
  for row in (row for row in GRIDS["rows"] if row["pinpoints"] == pinpoints):
    tile_size = row["patch_size"]
    resolutions = resolutions_of(pinpoints, tile_size)
    columns, rows = (
      side // tile_size for side in choose_resolution(*row["image_size_wh"], resolutions)
    )
    assert [columns, rows] == row["grid_wh"], row
    assert columns * rows + 1 == row["crops"], row
    tile_tokens = row["image_tokens"] // row["crops"]
    assert len(sequence_order(columns, rows, tile_tokens)) == row["image_tokens"], row


def test_grids_within_a_budget_of_pixels_agree():
  assert GRIDS["with_max_resolutions"]
  for row in GRIDS["with_max_resolutions"]:
    pinpoints, tile_size = row.get("pinpoints", range_by_default()), row["patch_size"]
    resolutions = resolutions_of(pinpoints, tile_size, row["max_resolutions"])
    chosen = choose_resolution(*row["size"], resolutions)
    assert [side // tile_size for side in chosen] == row["grid_wh"], row


def test_tile_sizes_that_the_official_code_refuses_are_as_good_as_others():
  assert GRIDS["patch_size_errors"]
  for tile_size, _ in GRIDS["patch_size_errors"]:
    assert choose_grid(2 * tile_size, tile_size, TilingConfig(), tile_size) == (2, 1)


def test_frames_of_a_video_are_stretched_as_officially():
  assert MANIFEST["video_anyres"]
  divisor = math.gcd(*(side for row in MANIFEST["video_anyres"] for side in row["out_shape"][-2:]))
  tile_size = max(size for size in TILE_SIZES if divisor % size == 0)
  for row in MANIFEST["video_anyres"]:
    resolutions = resolutions_of(row.get("pinpoints", range_by_default()), tile_size)
    assert choose_resolution(*row["frame_hw"], resolutions) == tuple(row["out_shape"][-2:])


@pytest.mark.parametrize("name", CROPS)
def test_images_are_cut_as_officially(name):
  row = CROPS[name]
  width, height = row["size_wh"]
  assert FAMILY.tensors("crops")[row["image"]].shape == (height, width, 3)
  tile_size = row["best_resolution_wh"][0] // row["grid_wh"][0]
  resolutions = resolutions_of(row["pinpoints"], tile_size)
  assert choose_resolution(width, height, resolutions) == tuple(row["best_resolution_wh"])
  assert len(tiles_of(name)) == row["crops"]


def tiles_of(name, way="out"):
  """An image as uint8 tiles [tiles, S, S, 3]: in a grid (out), padded, or stretched to a square."""
  row = CROPS[name]
  image = FAMILY.tensors("crops")[row["image"]]
  tile_size = row["best_resolution_wh"][0] // row["grid_wh"][0]
  if way == "out":
    return cut_tiles(image, *row["grid_wh"], tile_size)
  return resize(pad_to_square(image) if way == "pad" else image, tile_size)[None]


def places_of(key):
  """Which rows and columns of the pixels are stored, as slices."""
  semantics = MANIFEST["tensor_semantics"]
  general = [name for name in semantics if re.fullmatch(re.escape(name).replace("K", r"\d+"), key)]
  assert key in semantics or general, f"no word on {key}"
  meaning = semantics[key if key in semantics else general[0]]
  written = re.search(r"(\d*)::(\d+), ?(\d*)::(\d+)\]$", meaning)
  if not written:
    step = int(re.search(r"sub(\d+)$", key)[1])
    return slice(None, None, step), slice(None, None, step)
  top, down, left, right = (int(number or 0) for number in written.groups())
  return slice(top, None, down), slice(left, None, right)


def stored_keys():
  return [key for key in MANIFEST["files"]["crops.safetensors"] if not key.endswith("_u8")]


@pytest.mark.parametrize("key", stored_keys())
def test_pixels_of_tiles_agree(key):
  name = max((name for name in CROPS if key.startswith(f"{name}_")), key=len)
  way, tile, how = re.fullmatch(
    r"(out|pad|square)_?(crop\d+|lastcrop)?_(mean|sub\d+)", key.removeprefix(f"{name}_")
  ).groups()
  expected = FAMILY.tensors("crops")[key]
  tiles = tiles_of(name, way)
  if tile or way != "out":
    tiles = tiles[int(re.sub(r"\D", "", tile or "") or -1)]
  if how == "mean":
    pixels = np.asarray(normalise_pixels(jnp.asarray(tiles)), np.float64)
    assert_close(pixels.mean(axis=(-3, -2)), expected, absolute=PIXEL_TOLERANCE)
    return
  tiles = tiles[(..., *places_of(key), slice(None))]
  pixels = np.moveaxis(np.asarray(normalise_pixels(jnp.asarray(tiles))), -1, -3)
  assert_close(pixels, expected, absolute=PIXEL_TOLERANCE)
  as_bytes = np.moveaxis(expected, -3, -1) * PIXEL_STD + PIXEL_MEAN
  np.testing.assert_array_equal(tiles, np.rint(255 * as_bytes))


def test_visual_tokens_of_a_grid_stand_in_the_official_order():
  layouts = Golden("06_flash_full").json("layout.json")["layouts"]
  assert layouts
  for grid, pairs in layouts.items():
    columns, rows = map(int, re.fullmatch(r"grid_w(\d+)_h(\d+)", grid).groups())
    tile_tokens = 1 + max(token for _, token in pairs)
    expected = [tile_tokens * crop + token for crop, token in pairs]
    assert sequence_order(columns, rows, tile_tokens).tolist() == expected, grid
