"""Frame indices of the original, golden family 07: they agree exactly, errors included."""

import numpy as np
import pytest

from videochat_flash_jax.data.media.frame_sampling import evenly_spaced_indices, training_indices
from videochat_flash_jax.errors import InputError


def our_indices(args: dict) -> np.ndarray:
  return training_indices(
    args["sample"],
    args["vlen"],
    args["input_fps"],
    num_picks=args["num_frames"],
    min_frames=args["min_num_frames"],
    max_frames=args["max_num_frames"] if args["max_num_frames"] > 0 else None,
    local_frames=args["local_num_frames"],
    offset=args["fix_start"],
  )


def test_training_indices_agree_with_every_row(golden):
  rows = [row for row in golden("07_frames").json("frames.json")["rows"] if "error" not in row]
  assert rows
  for row in rows:
    assert our_indices(row["args"]).tolist() == row["indices"], row["args"]


def test_input_that_the_original_refuses_is_an_input_error(golden):
  rows = [row for row in golden("07_frames").json("frames.json")["rows"] if "error" in row]
  assert rows
  for row in rows:
    with pytest.raises(InputError):
      our_indices(row["args"])


def test_evenly_spaced_indices_agree_with_every_row_of_the_clip_reader(golden):
  rows = golden("07_frames").json("frames.json")["get_index_of_clip_reader"]
  assert rows
  for row in rows:
    indices = evenly_spaced_indices(row["num_frames"], row["num_segments"])
    assert indices.tolist() == row["indices"], row
