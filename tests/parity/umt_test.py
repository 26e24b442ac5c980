"""UMT of the original, golden family 01: outputs, every block, position tables."""

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import Golden, assert_close, number_written
from tests.parity.golden_models import RecordedLayers, load_golden, pixels_of, vision_config
from videochat_flash_jax.models.umt import UMT, position_table

MANIFEST = Golden("01_umt_vit").json()
CASES = [name for name, case in MANIFEST.items() if isinstance(case, dict) and "img_size" in case]
RELEASED_PATCH_SIZE = 16
TOLERANCE = 2e-5


def load_case(golden, case):
  tensors = golden("01_umt_vit").tensors(f"{case}.weights")
  mlp_width = len(tensors["encoder.blocks.0.mlp.fc1.bias"])
  config = vision_config(MANIFEST[case], mlp_width)
  model = load_golden(lambda: UMT(config, rngs=nnx.Rngs(0)), tensors, "vision")
  return model, golden("01_umt_vit").tensors(f"{case}.io")


def stored_pixels(case, io, kind):
  source = MANIFEST[case][kind]
  clips = np.moveaxis(io[source["tensor"]], 1, 2)  # [C, 3, F, h, w] to [C, F, 3, h, w]
  return pixels_of(clips, source["upsample"])


@pytest.mark.parametrize("case", CASES)
def test_features_agree(golden, case):
  model, io = load_case(golden, case)
  outputs = [key for key in io if "_out" in key]
  assert outputs
  for key in outputs:
    kind, stride = re.fullmatch(r"(\w+?)_out(?:_sub(\d+))?", key).groups()
    pixels = stored_pixels(case, io, kind)
    features = nnx.jit(UMT.__call__)(model, pixels)
    by_frame = features.reshape(*pixels.shape[:2], -1, features.shape[-1])
    assert_close(by_frame[:, :, :: int(stride or 1)], io[key], relative=TOLERANCE)


def probes_of(case):
  return [key for key in MANIFEST["files"][f"{case}.io.safetensors"] if key.startswith("probe_")]


@pytest.mark.parametrize("case", [case for case in CASES if probes_of(case)])
def test_patch_embedding_and_every_block_agree(golden, case):
  model, io = load_case(golden, case)
  stride = number_written(r"\[0::(\d+)\]", MANIFEST["probe"])
  model.blocks = RecordedLayers(model.blocks)
  states = {}
  for key in probes_of(case):
    _, kind, stage = key.split("_", 2)
    if kind not in states:
      pixels = stored_pixels(case, io, kind)[:1]
      first, *blocks = jax.jit(lambda pixels: (model(pixels), model.blocks.states)[1])(pixels)
      grid = pixels.shape[2] // MANIFEST[case]["patch_size"]
      table = position_table(model.config, num_frames=pixels.shape[1], grid=grid)
      states[kind] = {f"block{index}": state for index, state in enumerate(blocks)}
      states[kind]["patch_embed"] = first - table  # stored before the positions are added
    assert_close(states[kind][stage][0, ::stride], io[key], relative=TOLERANCE)


def table_for(width, image_size, num_frames, grid, position_frames=4):
  sizes = {"img_size": image_size, "patch_size": image_size // grid, "embed_dim": width}
  sizes |= {"blocks_present": 1, "num_heads": 1, "ckpt_num_frame": position_frames}
  return position_table(vision_config(sizes, 1), num_frames=num_frames, grid=grid)


def grid_of(row):
  """Patches along a side, from the number of rows of the whole table."""
  grid = math.isqrt(row["full_rows"] // row["num_frames"])
  assert grid**2 * row["num_frames"] == row["full_rows"], row
  return grid


@pytest.mark.parametrize("row", MANIFEST["tables"], ids=lambda row: row["name"])
def test_position_table_agrees(golden, row):
  expected = golden("01_umt_vit").tensors("pos_tables")[row["name"]]
  sizes = row["d_hid"], row["img"], row["num_frames"], grid_of(row)
  table = table_for(*sizes, row.get("ckpt_num_frame", 4))
  assert_close(table[:: row.get("stride", 1)], expected, relative=TOLERANCE)


def test_rows_of_the_released_position_tables_agree(golden):
  tables = golden("01_umt_vit").tensors("pos_tables")
  names = set(tables) - {row["name"] for row in MANIFEST["tables"]}
  stored_rows = {  # "[0,1,783] (448 video), [0,1] (448 image)"
    (size, kind == "image"): [int(number) for number in numbers.split(",")]
    for numbers, size, kind in re.findall(
      r"\[([\d, ]+)\]\s*\((\d+)\s*(\w*)\)", MANIFEST["tables_note"]
    )
  }
  assert names
  assert stored_rows, MANIFEST["tables_note"]
  for name in names:
    match = re.fullmatch(r"real(\d+)_(\d+)_(img|f\d+)_rows", name)
    assert match, name
    width, size, frames = match.groups()
    is_image = frames == "img"
    num_frames = 1 if is_image else int(frames[1:])
    table = table_for(int(width), int(size), num_frames, int(size) // RELEASED_PATCH_SIZE)
    assert_close(table[stored_rows[size, is_image]], tables[name], relative=TOLERANCE)
