"""Training on stored features: the same rows and the same loss, and no video is opened."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.data.batches.saved_batches import digest
from tests.data.batches.small_mixture import (
  CLIP_TOKENS,
  config,
  make_tokenizer,
  read_rows,
  write_mixture,
)
from tests.models.small_models import CONFIG, fill_randomly
from videochat_flash_jax.data.batches import row_media
from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN
from videochat_flash_jax.data.batches.train_batches import batch_metrics, mixture_batches
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import encode_mixture, open_features
from videochat_flash_jax.models.config import ConnectorConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train.losses import answer_loss, sequence_loss


def make_model():
  decoder = dataclasses.replace(CONFIG.decoder, vocab_size=make_tokenizer().vocab_size)
  connector = ConnectorConfig(CLIP_TOKENS, merge_heads=2)
  small = dataclasses.replace(CONFIG, connector=connector, decoder=decoder)
  return fill_randomly(lambda: VideoChatFlash(small, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  return read_rows(write_mixture(tmp_path_factory.mktemp("mixture"), 6, 3, 4))


@pytest.fixture(scope="module")
def store(rows, tmp_path_factory):
  engine = Engine(make_model(), [0])
  store = open_features(tmp_path_factory.mktemp("features") / "f", engine)
  assert encode_mixture(rows, config().example, engine, store).broken == 0
  return store


def batches(mixture, store, **changes):
  return iter(mixture_batches(config(**changes), mixture, make_tokenizer, features=store))


def test_rows_hold_features_instead_of_pixels_and_are_otherwise_the_same(rows, store):
  seen, stored, model = batches(rows, None), batches(rows, store), make_model()
  encode = jax.jit(model.encode_features)
  for _ in range(3):
    pixels, features = next(seen), next(stored)
    assert all(np.array_equal(pixels[name], features[name]) for name in PER_TOKEN)
    assert set(features) == {*PER_TOKEN, "features", "tile_features"}
    for kind, stored_kind in (("frames", "features"), ("tiles", "tile_features")):
      used = features[stored_kind].any(axis=(2, 3))
      assert np.array_equal(used, pixels[kind].any(axis=(2, 3, 4, 5)))
      expected = np.asarray(encode(pixels[kind]), np.float32)[used]
      found = features[stored_kind].astype(np.float32)[used]
      np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.slow
def test_the_loss_on_stored_features_is_that_on_rounded_features(rows, store):
  model, layout = make_model(), {"num_shards": 1, "zigzag": False, "rows": 1}
  pixels, features = next(batches(rows, None, **layout)), next(batches(rows, store, **layout))

  def loss_of_rounded(model, pixels):
    kinds = [model.encode_features(pixels[kind]) for kind in ("frames", "tiles")]
    merged = jnp.concatenate(kinds, axis=1).astype(jnp.bfloat16).astype(jnp.float32)
    visual_tokens = model.connector.project(merged).reshape(1, -1, CONFIG.decoder.width)
    return sequence_loss(model, visual_tokens, pixels)

  loss = quick_jit(answer_loss)(model, features).means()["loss"]
  rounded = quick_jit(loss_of_rounded)(model, pixels).means()["loss"]
  exact = quick_jit(answer_loss)(model, pixels).means()["loss"]
  assert_close(loss, rounded, relative=2e-5)
  assert_close(loss, exact, relative=0.01)


@pytest.mark.slow
def test_worker_processes_give_the_same_features(rows, store):
  alone, shared = batches(rows, store), batches(rows, store, workers=1)
  assert [digest(next(shared)) for _ in range(2)] == [digest(next(alone)) for _ in range(2)]
  shared.close()


def test_no_video_is_opened(rows, store, monkeypatch):
  def fail(*_):
    raise AssertionError("a video was opened")

  monkeypatch.setattr(row_media, "open_video", fail)
  next(batches(rows, store))


def test_a_row_whose_video_is_not_in_the_store_counts_as_broken(rows, store):
  others = batches(rows, store, frames=(4, 8), max_broken_share=1.0)
  for _ in range(3):
    next(others)
  metrics = batch_metrics(others.get_state())
  assert metrics["broken/no features"] == metrics["broken_share"] * metrics["examples"] > 0


def test_a_state_of_batches_with_pixels_is_refused_with_features_and_vice_versa(rows, store):
  seen, stored = batches(rows, None), batches(rows, store)
  with pytest.raises(InputError, match="made with features None, now it is"):
    stored.set_state(seen.get_state())
  with pytest.raises(InputError, match="made with features"):
    seen.set_state(stored.get_state())
