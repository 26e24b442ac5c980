"""Visual tokens: the model makes as many as the data side, flops and `vcflash compile` count."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.conftest import quick_jit
from tests.data.batches.small_mixture import make_tokenizer
from tests.data.media.video_files import pictures, write_video
from tests.train.small_config import COMMON
from videochat_flash_jax.cli.config_file import load_config
from videochat_flash_jax.data.batches.examples import ExampleReader, media_shapes
from videochat_flash_jax.data.batches.row_packer import Packed, write_row
from videochat_flash_jax.data.batches.sharded_rows import empty_rows
from videochat_flash_jax.data.features.feature_key import FeatureKey
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.media.image_tiling import choose_grid, sequence_order
from videochat_flash_jax.models.config import TilingConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.testing.dummy import dummy_config, dummy_model
from videochat_flash_jax.train.batches import batch_shapes
from videochat_flash_jax.train.config import data_config, train_settings
from videochat_flash_jax.train.flops import step_flops
from videochat_flash_jax.train.losses import sequence_loss

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TWO = [TURNS[0] | {"value": "<image> or <image>?"}, TURNS[1]]
WIDE, HIGH, SMALL = (60, 130), (90, 31), (32, 32)


def sized(config: VideoChatFlashConfig, image_size, **connector) -> VideoChatFlashConfig:
  return dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, image_size=image_size),
    connector=dataclasses.replace(config.connector, **connector),
  )


TINY, B2 = VideoChatFlashConfig.tiny(), VideoChatFlashConfig.qwen2_5_2b_res448()
INTERN = VideoChatFlashConfig.qwen2_5_7b_internvideo2_1b()


@pytest.mark.parametrize(
  "config, of_clip, of_tile",
  [
    (TINY, 24, 16),
    (sized(TINY, 48), 24, 24),
    (sized(TINY, 16), 16, 4),
    (sized(TINY, 8), 4, 1),
    (B2, 64, 64),
    (sized(B2, 112), 64, 49),
    (sized(B2, 48), 36, 9),
    (INTERN, 64, 64),
    (sized(INTERN, 98), 64, 49),
  ],
)
def test_the_encoder_makes_as_many_tokens_as_are_counted(config, of_clip, of_tile):
  def tokens_of(num_frames):
    shallow = dataclasses.replace(
      config,
      vision=dataclasses.replace(config.vision, depth=1),
      decoder=dataclasses.replace(config.decoder, depth=1, vocab_size=8),
    )
    size = config.vision.image_size
    frames = jax.ShapeDtypeStruct((1, num_frames, size, size, 3), jnp.uint8)
    model = nnx.eval_shape(lambda: VideoChatFlash(shallow, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda model, frames: model.encode(frames), model, frames).shape[1]

  assert (config.clip_tokens, config.tile_tokens) == (of_clip, of_tile)
  assert (tokens_of(config.vision.clip_frames), tokens_of(1)) == (of_clip, of_tile)


def settings_of(model: VideoChatFlashConfig, **changes):
  """The small run with another model, and room for tiles."""
  config = load_config(COMMON.parents[1] / "tests" / "train" / "small_config.py")
  config.image_size = model.vision.image_size
  config.tokens_per_row, config.clips_per_shard, config.tiles_per_shard = 1024, 4, 16
  config.data.frames = (4, 16)
  return dataclasses.replace(train_settings(config), model=model, **changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """A wide image, a film of 3 clips, two images, another image, text."""
  folder = tmp_path_factory.mktemp("media")
  for name, size in (("wide", WIDE), ("high", HIGH), ("small", SMALL)):
    Image.fromarray(pictures(1, *size)[0]).save(folder / f"{name}.png")
  write_video(folder / "film.mp4", pictures(12), fps=1)
  path = {name: str(folder / name) for name in ("wide.png", "high.png", "small.png", "film.mp4")}
  return [
    {"image": path["wide.png"], "conversations": TURNS},
    {"video": path["film.mp4"], "conversations": TURNS},
    {"image": [path["high.png"], path["small.png"]], "conversations": TWO},
    {"image": path["high.png"], "conversations": TURNS},
    {"conversations": [TURNS[0] | {"value": "Hm?"}, TURNS[1]]},
  ]


@pytest.mark.parametrize(
  "image_size, clip_tokens", [(32, 24), pytest.param(56, 64, marks=pytest.mark.slow), (16, 64)]
)
def test_in_a_packed_row_every_slot_has_the_token_of_its_own_picture(rows, image_size, clip_tokens):
  """Tiles of 16, 49 and 4 tokens; clips of 24, 64 and 16."""
  config = sized(dummy_config(), image_size, clip_tokens=clip_tokens)
  model = dummy_model(dataclasses.replace(config, tiling=TilingConfig(2, 2)))
  config = data_config(settings_of(model.config), num_shards=1, streams=1)
  reader = ExampleReader(config.example, config.row_shape, make_tokenizer)
  examples = [reader.read(row, np.random.default_rng(0)) for row in rows]
  batch = empty_rows(config.row_shape, 1, *media_shapes(config.example, None))
  packed = [Packed(number, number, example) for number, example in enumerate(examples)]
  write_row(packed, config.row_shape, batch, 0)
  batch = jax.tree.map(jnp.asarray, batch)

  @quick_jit
  def computed(batch, clips, tiles):
    """The loss, the embedded row, and the tokens of clips and tiles by themselves."""
    tokens = model.encode_rows(batch["frames"], tiles=batch["tiles"])
    sequence = model.embed_sequence(batch["token_ids"], tokens, batch["visual_index"])
    alone = [model.encode(pictures) for pictures in (clips, tiles)]
    return sequence_loss(model, tokens, batch), sequence[0], *alone

  media = [np.concatenate([getattr(x, name) for x in examples]) for name in ("frames", "tiles")]
  sums, sequence, of_clips, of_tiles = computed(batch, *media)
  assert np.isfinite(sums.loss) and sums.count > 20
  start = num_clips = num_tiles = 0
  for row, example in zip(rows, examples, strict=True):
    end, last_clip = start + len(example.token_ids), num_clips + len(example.frames)
    last_tile = num_tiles + len(example.tiles)
    kinds = of_clips[num_clips:last_clip], of_tiles[num_tiles:last_tile]
    expected = np.concatenate([tokens.reshape(-1, sequence.shape[1]) for tokens in kinds])
    if isinstance(row.get("image"), str):  # one image, in tiles that are read like one picture
      with Image.open(row["image"]) as image:
        grid = choose_grid(*image.size, config.example.tiling, image_size)
      expected = expected[sequence_order(*grid, of_tiles.shape[1])]
    is_visual = batch["visual_index"][0, start:end] >= 0
    np.testing.assert_allclose(sequence[start:end][is_visual], expected, atol=1e-4)
    start, num_clips, num_tiles = end, last_clip, last_tile
  assert num_clips == 3 and num_tiles >= 8


def with_features(settings):
  data = dataclasses.replace(settings.data, features="somewhere")
  return dataclasses.replace(settings, data=data)


def test_stored_features_have_the_shapes_that_the_connector_gives():
  settings = with_features(settings_of(sized(dummy_config(), 32, clip_tokens=24)))
  batch = batch_shapes(settings, Layout(make_mesh(MeshConfig(sequence=1), jax.devices()[:1])))
  width = settings.model.vision.width
  assert batch["features"].shape == (1, 4, 24, width)
  assert batch["tile_features"].shape == (1, 16, 16, width)
  key = FeatureKey.of(sized(dummy_config(), 16, clip_tokens=24), "bfloat16", "abc")
  assert FeatureStore(Path("somewhere"), key).clip_shape == (16, width)


def test_the_work_of_the_connector_is_that_on_the_tokens_of_tiles():
  def of_tiles(image_size):
    settings = with_features(settings_of(sized(TINY, image_size)))
    without = dataclasses.replace(settings, tiles_per_shard=0)
    return step_flops(settings, 1) - step_flops(without, 1)

  assert of_tiles(32) == pytest.approx(of_tiles(48) * 16 / 24)
