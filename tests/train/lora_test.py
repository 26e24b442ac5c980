"""LoRA: only adapters are trained, and merged weights give the outputs of adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import CONFIG, fill_randomly
from tests.train.losses_test import answer_batch
from videochat_flash_jax.checkpoints.convert import flat_weights
from videochat_flash_jax.checkpoints.runs.adapters import merge_adapters
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import LoraConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.step import make_step, split_state

EVERYWHERE = LoraConfig(rank=3, alpha=6.0, targets=r"proj|fc[12]$|qkv|patch_embed")
ATTENTION = [f"decoder.layers.stacked.{name}_proj" for name in "qkvo"]


def adapted(lora, config=CONFIG):
  model = fill_randomly(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0)))
  add_adapters(model, lora, nnx.Rngs(1))
  return model


def weights_of(model):
  return {path: np.asarray(w) for path, w in flat_weights(nnx.state(model, nnx.Param))}


def adapters_in(weights):
  return {path for path in weights if path.endswith(("lora_a", "lora_b"))}


@nnx.jit
def logits(model):
  batch = answer_batch()
  ids = batch["token_ids"] % model.config.decoder.vocab_size
  x = model.decoder.embed(ids)
  features = model.connector(model.vision(jnp.ones((1, 4, 32, 32, 3)) * 0.3))
  x = x.at[:, : features.shape[1]].add(features)
  return model.decoder.logits(model.decoder(x, segment_ids=batch["segment_ids"]))


@pytest.mark.slow
def test_twenty_steps_change_adapters_and_no_other_weights():
  tiny = VideoChatFlashConfig.tiny()
  model = VideoChatFlash(tiny, rngs=nnx.Rngs(0))
  add_adapters(model, LoraConfig(rank=4), nnx.Rngs(1))
  optimizer = optax.adamw(1e-2)
  graph, state = split_state(model, lambda path: "lora_" in path, optimizer)
  before = jax.tree.map(np.array, state)
  step = make_step(graph, answer_loss, optimizer)
  losses = []
  for _ in range(20):
    state, metrics = step(state, answer_batch())
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
  paths = [dotted_path(path) for path, _ in jax.tree.leaves_with_path(state.trained)]
  assert sorted(paths) == sorted(f"{layer}.lora_{ab}" for layer in ATTENTION for ab in "ab")
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trained, before.trained)
  assert all(jax.tree.leaves(moved))


def test_new_adapters_change_nothing_and_are_drawn_for_each_layer():
  plain, model = (
    fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0))),
    adapted(EVERYWHERE),
  )
  np.testing.assert_array_equal(logits(model), logits(plain))
  weights = weights_of(model)
  assert {path for path in weights if path not in weights_of(plain)} == adapters_in(weights)
  a = weights["decoder.layers.stacked.down_proj.lora_a"]
  assert a.shape == (CONFIG.decoder.depth, CONFIG.decoder.mlp_width, 3)
  assert weights["decoder.layers.stacked.down_proj.lora_b"].shape == (3, 3, CONFIG.decoder.width)
  bound = CONFIG.decoder.mlp_width**-0.5
  assert 0.9 * bound < np.abs(a).max() <= bound and (a[0] != a[1]).all()
  assert "vision.patch_embed.lora_a" in weights and "connector.fc2.lora_b" in weights


def test_merged_weights_give_the_logits_of_the_adapted_model():
  model = adapted(EVERYWHERE)
  rng = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[-1] == "lora_b":
      leaf.set_value(jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32))
  nnx.update(model, nnx.state(model))
  expected, weights = logits(model), weights_of(model)
  assert np.abs(expected - logits(adapted(EVERYWHERE))).max() > 0.1
  merged = merge_adapters(weights, EVERYWHERE)
  plain = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(plain)
  filled = [
    (path, leaf.replace(jnp.asarray(np.asarray(merged.pop(dotted_path(path))))))
    for path, leaf in nnx.to_flat_state(state)
  ]
  assert not merged
  assert_close(logits(nnx.merge(graph, nnx.from_flat_state(filled))), expected, absolute=1e-4)


def test_a_kernel_frozen_in_bfloat16_is_merged_in_the_adapter_s_float32():
  kernel = np.ones((2, 3), jnp.bfloat16)
  a, b = np.full((2, 1), 0.5, np.float32), np.full((1, 3), 1e-3, np.float32)
  weights = {"fc1.kernel": kernel, "fc1.lora_a": a, "fc1.lora_b": b, "norm.scale": kernel[0]}
  merged = merge_adapters(weights, LoraConfig(rank=1, alpha=2.0))
  assert merged.keys() == {"fc1.kernel", "norm.scale"} and merged["fc1.kernel"].dtype == np.float32
  np.testing.assert_allclose(merged["fc1.kernel"], 1.001, rtol=1e-6)


@pytest.mark.parametrize(
  "targets, words",
  [
    (r"decoder\.layers\.stacked\.query_proj", "decoder.layers.stacked.q_proj"),
    ("lm_head", "matches no linear layer"),
    ("q_proj(", "is no regular expression"),
  ],
)
def test_targets_that_match_no_layer_are_refused(targets, words):
  untied = dataclasses.replace(CONFIG.decoder, tied_embeddings=False)
  config = dataclasses.replace(CONFIG, decoder=untied)
  with pytest.raises(InputError, match=r"config\.lora\.targets") as caught:
    adapted(LoraConfig(rank=2, targets=targets), config)
  assert words in str(caught.value) and "\n" not in str(caught.value)
