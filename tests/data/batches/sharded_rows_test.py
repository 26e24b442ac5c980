import numpy as np
import pytest

from tests.data.batches.sharded_batch import shard_rows
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.zigzag import unzigzag_order

LENGTH, CLIP_TOKENS, CLIPS = 24, 3, 4


def batch():
  """Two rows; all pixels of clip c of a row are the number 10 * row + c."""
  frames = np.arange(2)[:, None] * 10 + np.arange(CLIPS)
  visual_index = np.full((2, LENGTH), -1)
  visual_index[0, 2:14] = np.arange(12)
  visual_index[1, 5:11], visual_index[1, 15:21] = np.arange(6), np.arange(6, 12)
  per_token = np.arange(2 * LENGTH).reshape(2, LENGTH)
  return {
    "frames": np.broadcast_to(frames[..., None, None, None, None], (2, CLIPS, 4, 8, 8, 3)),
    "visual_index": visual_index,
    **dict.fromkeys(("token_ids", "labels", "positions", "segment_ids"), per_token),
  }


def visual_tokens(batch, num_shards):
  """The clip and the token of that clip at each position; each shard only uses its own clips."""
  clips = (
    batch["frames"][:, :, 0, 0, 0, 0].astype(int).reshape(len(batch["frames"]), num_shards, -1)
  )
  index = batch["visual_index"].reshape(len(clips), num_shards, -1)
  picture = np.take_along_axis(clips, np.maximum(index, 0) // CLIP_TOKENS, axis=2)
  token = np.maximum(index, 0) % CLIP_TOKENS
  return [np.where(index >= 0, x, -1).reshape(len(clips), -1) for x in (picture, token)]


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_position_holds_the_same_token_of_the_same_clip(num_shards, zigzag):
  sharded = shard_rows(
    batch(),
    num_shards=num_shards,
    zigzag=zigzag,
    clip_tokens=CLIP_TOKENS,
    clips_per_shard=CLIPS,
  )
  assert sharded["frames"].shape == (2, num_shards * CLIPS, 4, 8, 8, 3)
  back = unzigzag_order(LENGTH, num_shards) if zigzag else np.arange(LENGTH)
  for ours, theirs in zip(
    visual_tokens(sharded, num_shards), visual_tokens(batch(), 1), strict=True
  ):
    np.testing.assert_array_equal(ours[:, back], theirs)
  np.testing.assert_array_equal(sharded["token_ids"][:, back], batch()["token_ids"])


@pytest.mark.parametrize(
  "change, said",
  [
    ({"num_shards": 5}, "rows of 24 tokens cannot be split into 5 equal parts; pad them to 25"),
    ({"clips_per_shard": 2}, "row 0 has 4 clips in part 0 of its tokens, but clips_per_shard is 2"),
  ],
)
def test_rows_that_do_not_fit_are_refused(change, said):
  arguments = {"num_shards": 1, "zigzag": False, "clip_tokens": 3, "clips_per_shard": 4, **change}
  with pytest.raises(InputError, match=said):
    shard_rows(batch(), **arguments)
