import dataclasses
from pathlib import Path

import numpy as np
import pytest

from videochat_flash_jax.cli.config_file import load_config
from videochat_flash_jax.data.batches.examples import Example
from videochat_flash_jax.data.batches.row_packer import NUM_HELD, Packed, RowPacker, write_row
from videochat_flash_jax.data.batches.sharded_rows import RowShape, empty_rows
from videochat_flash_jax.data.media.image_tiling import choose_grid
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import TilingConfig
from videochat_flash_jax.parallel.zigzag import unzigzag_order
from videochat_flash_jax.train.config import data_config, train_settings

CONFIGS = Path(__file__).parents[3] / "configs"

# As configs/stage3_long.py has it, and with the paper's shares of images, short and long videos.
STAGE3 = {
  "tokens": 32_768, "clip_tokens": 64, "clips_per_shard": 128, "tiles_per_shard": 40,
  "zigzag": True,
}  # fmt: skip
SHARES = {"image": 0.31, "short": 0.46, "long": 0.2, "text": 0.03}
SMALL = RowShape(96, 4, clips_per_shard=7, tiles_per_shard=5, num_shards=4, zigzag=True)
SMALL_TILES = dataclasses.replace(SMALL, tile_tokens=3)


def example(mark, num_clips, num_tiles, num_text, clip_tokens, tile_tokens=None):
  """Clips, then tiles, inside of text; every picture, token and label holds one number."""
  num_visual = num_clips * clip_tokens + num_tiles * (tile_tokens or clip_tokens)
  length = num_visual + num_text
  visual_index = np.full(length, -1, np.int32)
  visual_index[num_text // 2 : num_text // 2 + num_visual] = np.arange(num_visual)
  tokens = np.full(length, mark, np.int32)
  frames, tiles = (
    np.broadcast_to(
      (10 * mark + np.arange(count, dtype=np.uint8))[:, None, None, None, None], shape
    )
    for count, shape in ((num_clips, (num_clips, 4, 1, 1, 3)), (num_tiles, (num_tiles, 1, 1, 1, 3)))
  )
  return Example(frames, tiles, tokens, tokens, visual_index, np.arange(length, dtype=np.int32))


def draw(rng, mark):
  """Of a stage-3 mixture: 64 to 512 frames, images of 2 to 37 tiles, text alone."""
  kind = rng.choice(list(SHARES), p=list(SHARES.values()))
  clips = {"long": rng.integers(17, 129), "short": 16}.get(kind, 0)
  tiles = rng.integers(2, 38) if kind == "image" else 0
  return example(mark, int(clips), int(tiles), int(rng.integers(40, 600)), STAGE3["clip_tokens"])


@pytest.fixture(scope="module", params=[4, 8])
def packed(request):
  """Rows packed from 800 examples, and what is left in the packer."""
  row_shape = RowShape(num_shards=request.param, **STAGE3)
  rng, packer, rows = np.random.default_rng(0), RowPacker(row_shape), []
  for number in range(800):
    row = packer.add(Packed(number, number, draw(rng, number % 20)))
    assert sum(bin.num_tokens for bin in packer._bins) <= NUM_HELD * row_shape.tokens
    if row:
      rows.append(row)
  return rows, [[number for number, _ in row] for row in packer.unfinished]


def test_no_example_is_lost_or_doubled(packed):
  rows, waiting = packed
  numbers = [[item.number for item in row] for row in rows] + waiting
  assert sorted(number for row in numbers for number in row) == list(range(800))


def test_rows_of_stage_3_are_filled_to_98_percent(packed):
  rows, _ = packed
  filled = [sum(len(item.example.token_ids) for item in row) for row in rows]
  assert max(filled) <= STAGE3["tokens"]
  assert np.mean(filled) > 0.98 * STAGE3["tokens"]


def draw_of_stage_1(rng):
  """Of 558,000 images, 336 pixels along the shorter side, and 481,000 clips, all with captions."""
  if rng.random() < 481 / (481 + 558):
    return example(1, 1, 0, int(rng.integers(10, 40)), 64)
  long = int(336 * rng.choice([1, 1.1, 1.33, 1.5, 1.78], p=[0.35, 0.1, 0.3, 0.2, 0.05]))
  columns, rows = choose_grid(*rng.permutation([336, long]), TilingConfig(), tile_size=224)
  return example(1, 0, 1 + int(columns * rows), int(rng.integers(8, 40)), 64)


def test_rows_of_stage_1_are_filled_to_99_percent_with_as_many_examples_as_the_config_says():
  settings = train_settings(load_config(CONFIGS / "stage1_align.py"))
  row_shape = data_config(settings, num_shards=1, streams=1).row_shape
  rng, packer = np.random.default_rng(0), RowPacker(row_shape)
  packed = (packer.add(Packed(number, number, draw_of_stage_1(rng))) for number in range(1500))
  rows = [row for row in packed if row]
  filled = [sum(len(item.example.token_ids) for item in row) for row in rows]
  assert np.mean(filled) > 0.99 * row_shape.tokens
  assert settings.rows * np.mean([len(row) for row in rows]) == pytest.approx(540, rel=0.03)


def test_no_example_waits_for_long(packed):
  rows, _ = packed
  for number, row in enumerate(rows):
    newest = max(item.number for row in rows[: number + 1] for item in row)
    assert newest - min(item.number for item in row) < 400


def test_rows_begun_again_are_packed_as_before():
  rng = np.random.default_rng(1)
  items = [Packed(number, 2 * number, draw(rng, 1)) for number in range(120)]
  one, other = (RowPacker(RowShape(num_shards=4, **STAGE3)) for _ in range(2))
  for item in items[:60]:
    one.add(item)
  for row in one.unfinished:
    assert all(source_row == 2 * number for number, source_row in row)
    other.begin_row([items[number] for number, _ in row])
  rest = [[packer.add(item) for item in items[60:]] for packer in (one, other)]
  numbers = [[row and [item.number for item in row] for row in rows] for rows in rest]
  assert numbers[0] == numbers[1] and any(numbers[0]) and one.unfinished == other.unfinished


def test_examples_that_do_not_fit_together_any_more_are_refused():
  whole = Packed(0, 31, example(1, 8, 0, 60, SMALL.clip_tokens))
  with pytest.raises(InputError, match=r"^rows 31, 31 of the mixture .* have changed"):
    RowPacker(SMALL).begin_row([whole, whole])


def test_examples_put_anywhere_wait_until_others_are_added():
  items = [Packed(number, number, example(1, 1, 0, 80, SMALL.clip_tokens)) for number in range(9)]
  packer = RowPacker(SMALL, num_held=2)
  for item in items:
    packer.put(item)
  assert packer.unfinished == [[[number, number]] for number in range(9)]
  assert [item.number for item in packer.add(items[0])] == [0]


@pytest.mark.parametrize("shape", [SMALL, SMALL_TILES])
def test_clips_and_tiles_of_every_shard_fit_and_each_token_comes_from_its_own_picture(shape):
  rng, packer, num_rows, fullest = np.random.default_rng(2), RowPacker(shape, num_held=2), 0, 0
  for number in range(400):
    sizes = rng.integers(0, 6), rng.integers(0, 4), rng.integers(1, 14)
    made = example(number % 20, *map(int, sizes), shape.clip_tokens, shape.tile_tokens)
    row = packer.add(Packed(number, number, made))
    if row:
      num_rows += 1
      written = empty_rows(shape, 1, (4, 1, 1, 3), (1, 1, 1, 3))
      write_row(row, shape, written, 0)  # raises where a shard has no room
      fullest = max(fullest, check_written(row, written, shape))
  assert num_rows > 50
  assert fullest == shape.clips_per_shard  # so that the budget was in the way at least once


def tokens_of(clips, tiles, shape):
  """The picture that each visual token is from, and its number in the picture, both [.., V]."""
  sizes = (clips, shape.clip_tokens), (tiles, shape.tile_tokens)
  pictures = np.concatenate([np.repeat(x, size, axis=-1) for x, size in sizes], axis=-1)
  numbers = [np.tile(np.arange(size), x.shape[-1]) for x, size in sizes]
  return pictures, np.broadcast_to(np.concatenate(numbers), pictures.shape)


def check_written(row, written, shape):
  """Compares a row with its examples, token by token; gives the most clips of a shard."""
  frames, tiles = (
    written[name][0, :, 0, 0, 0, 0].reshape(shape.num_shards, -1) for name in ("frames", "tiles")
  )
  own = written["visual_index"][0].reshape(shape.num_shards, -1)
  back = unzigzag_order(shape.tokens, shape.num_shards)
  seen, token = (
    np.take_along_axis(x, np.maximum(own, 0), axis=1).reshape(-1)[back]
    for x in tokens_of(frames, tiles, shape)
  )
  fields = {name: written[name][0][back] for name in ("token_ids", "labels", "positions")}
  segments, offset = written["segment_ids"][0][back], 0
  for segment, item in enumerate(row, start=1):
    span = slice(offset, offset + len(item.example.token_ids))
    is_visual = item.example.visual_index >= 0
    media = (x[:, 0, 0, 0, 0] for x in (item.example.frames, item.example.tiles))
    pictures, numbers = tokens_of(*media, shape)
    index = item.example.visual_index[is_visual]
    np.testing.assert_array_equal(seen[span][is_visual], pictures[index])
    np.testing.assert_array_equal(token[span][is_visual], numbers[index])
    np.testing.assert_array_equal(written["visual_index"][0][back][span] >= 0, is_visual)
    for name, values in fields.items():
      np.testing.assert_array_equal(values[span], getattr(item.example, name))
    assert (segments[span] == segment).all()
    offset = span.stop
  assert (segments[offset:] == 0).all() and (fields["labels"][offset:] == IGNORE_LABEL).all()
  is_clip = (own >= 0) & (own < shape.clips_per_shard * shape.clip_tokens)
  return max(
    len(np.unique(part[mask] // shape.clip_tokens)) for part, mask in zip(own, is_clip, strict=True)
  )
