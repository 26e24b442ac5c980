"""InternVideo2 of the original, golden family 02: outputs, every block, position tables."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import Golden, assert_close, number_written
from tests.parity.golden_models import RecordedLayers, load_golden, pixels_of, vision_config
from videochat_flash_jax.models.internvideo2 import (
  InternVideo2,
  joint_image_positions,
  resample_positions,
  sincos_positions,
)

FAMILY = Golden("02_internvideo2_vit")
MANIFEST = FAMILY.json()
PREFIXES = [  # of the files of each model: "" and "joint_pos."
  name.removesuffix("weights.safetensors")
  for name in MANIFEST["files"]
  if name.endswith("weights.safetensors")
]
KINDS = ["video", "image"]
TOLERANCE = 2e-5


def load_case(prefix):
  """The model and its stored outputs."""
  tensors = FAMILY.tensors(f"{prefix}weights")
  sizes = MANIFEST["config"] | MANIFEST.get(prefix.removesuffix("."), {})
  if not sizes["sep_image_video_pos_embed"]:
    joint = tensors["pos_embed"][0]
    tensors["img_pos_embed"] = joint_image_positions(joint, table_frames=sizes["num_frames"])[None]
  config = dataclasses.replace(
    vision_config(sizes, mlp_width=sizes["mlp_hidden"]),
    kind="internvideo2",
    clip_frames=sizes["num_frames"],
  )
  model = load_golden(lambda: InternVideo2(config, rngs=nnx.Rngs(0)), tensors, "vision")
  return model, FAMILY.tensors(f"{prefix}io")


def stored_pixels(kind):
  clips = np.moveaxis(FAMILY.tensors("io")[f"{kind}_u8"], 1, 2)  # to [C, F, 3, h, w]
  return pixels_of(clips, MANIFEST["config"]["img_size"] // clips.shape[-1])


def run_recorded(model, pixels):
  """Features, and what enters the first block and leaves each, with the class token."""
  model.blocks = RecordedLayers(model.blocks)
  return jax.jit(lambda pixels: (model(pixels), model.blocks.states))(pixels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix or "main")
def test_features_agree_and_the_class_token_stays_inside(prefix, kind):
  model, outputs = load_case(prefix)
  features, states = run_recorded(model, stored_pixels(kind))
  expected = outputs[f"{kind}_out"]  # with the class token as row 0
  assert_close(states[-1], expected, relative=TOLERANCE)
  assert_close(features, expected[:, 1:], relative=TOLERANCE)


def test_patch_embedding_and_every_block_agree():
  model, stored = load_case("")
  row_stride = number_written(r"\[0::(\d+)\]", MANIFEST["probe"])
  patch_stride = number_written(r"\[:, ?::(\d+)\]", MANIFEST["probe"])
  pixels = stored_pixels("video")[:1]
  _, states = run_recorded(model, pixels)
  probes = {key.removeprefix("probe_"): stored[key] for key in stored if key.startswith("probe_")}
  # Stored before the class token and the positions are added, frame by frame.
  patches = (states[0, 0] - model.video_positions[...])[1:]
  patches = patches.reshape(pixels.shape[1], -1, model.config.width)
  assert_close(patches[:, ::patch_stride], probes.pop("patch_embed"), relative=TOLERANCE)
  assert probes.keys() == {f"video_block{index}" for index in range(model.config.depth)}
  for index, state in enumerate(states[1:]):
    assert_close(state[0, ::row_stride], probes[f"video_block{index}"], relative=TOLERANCE)


@pytest.mark.parametrize("row", MANIFEST["tables"], ids=lambda row: row["name"])
def test_initial_positions_agree(row):
  expected = FAMILY.tensors("pos_tables")[row["name"]]
  table = sincos_positions(row["embed"], num_frames=row["t"], grid=row["grid"])
  assert len(table) == row.get("full_rows", len(table))
  table = table[row.get("row_subset", slice(None))]
  assert_close(table, expected.reshape(-1, row["embed"]), relative=TOLERANCE)


@pytest.mark.parametrize("row", MANIFEST["interpolation"], ids=lambda row: row["name"])
def test_resampled_positions_agree(row):
  tables = {name: table[0] for name, table in FAMILY.tensors("pos_tables").items()}
  for kind, table_frames, num_frames in (("pos", row["orig_t"], row["new_t"]), ("img", 1, 1)):
    resampled = resample_positions(
      tables[f"{row['name']}_in_{kind}"],
      table_frames=table_frames,
      num_frames=num_frames,
      grid=row["new_grid"],
    )
    assert_close(resampled, tables[f"{row['name']}_out_{kind}"], relative=TOLERANCE)


def test_every_stored_table_is_compared():
  named = {row["name"] for row in MANIFEST["tables"] + MANIFEST["interpolation"]}
  stored = FAMILY.tensors("pos_tables")
  assert {re.sub(r"_(in|out)_(pos|img)$", "", name) for name in stored} == named
