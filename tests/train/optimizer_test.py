"""The optimisers: AdamW, or Muon for the matrices of layers; learning rates; frozen weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.models.small_models import CONFIG, VISION
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import LoraConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.norms import LayerNorm, RMSNorm
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.optimizer import (
  learning_rate_at,
  make_optimizer,
  scale_of,
  trained_paths,
)
from videochat_flash_jax.train.settings import OptimizerSettings

ADAMW = OptimizerSettings(
  name="adamw",
  learning_rate=1e-5,
  scales=(("vision", 0.2), ("", 1.0)),
  warm_up=0.03,
  final=0.0,
  weight_decay=0.0,
  clip_norm=1.0,
)
MUON = dataclasses.replace(ADAMW, name="muon", learning_rate=0.1, scales=(("", 1.0),))
INTERN_VIDEO = dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, kind="internvideo2"))
PATHS = ("vision.norm.scale", "connector.fc1.kernel", "decoder.norm.scale")


def second_update(weights, gradients):
  """The update of step 1: at step 0 of a warm-up the rate is zero."""
  optimizer = make_optimizer(MUON, num_steps=20)
  state = optimizer.init(weights)
  for _ in range(2):
    updates, state = optimizer.update(gradients, state, weights)
  return updates


def test_updates_of_stacked_matrices_are_nearly_orthogonal_in_each_layer():
  rng = np.random.default_rng(0)
  left, _, right = np.linalg.svd(rng.standard_normal((3, 8, 8)))
  gradients = left * np.linspace(0.3, 2.0, 8) @ right
  layers = {"stacked": {"kernel": jnp.asarray(gradients, jnp.float32)}}
  update = second_update(layers, layers)["stacked"]["kernel"]
  for matrix in np.asarray(update, np.float64):
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert singular.max() < 2 * singular.min()


def test_other_weights_move_by_equal_steps_against_the_sign_of_their_gradient():
  gradients = {
    "embedding": jnp.array([[3.0, -1e-3], [2.0, 5.0]]),
    "stacked": {"bias": jnp.array([[1.0, -4.0]])},
  }
  updates = second_update(gradients, gradients)
  step = abs(float(updates["embedding"][0, 0]))
  np.testing.assert_allclose(updates["embedding"], [[-step, step], [-step, -step]], rtol=1e-3)
  np.testing.assert_allclose(updates["stacked"]["bias"], [[-step, step]], rtol=1e-3)


def plain_adamw(weights, gradients, settings, num_steps):
  """Steps of AdamW (Loshchilov & Hutter 2019) after clipping, in float64, a rate per weight."""
  weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  first = {name: np.zeros_like(value) for name, value in weights.items()}
  second = {name: np.zeros_like(value) for name, value in weights.items()}
  warm_up = int(np.ceil(settings.warm_up * num_steps))
  for step, now in enumerate(gradients):
    now = {name: np.asarray(value, np.float64) for name, value in now.items()}
    norm = np.sqrt(sum((value**2).sum() for value in now.values()))
    share = (step - warm_up) / (num_steps - warm_up)
    rate = step / warm_up if step < warm_up else 0.5 * (1 + np.cos(np.pi * share))
    for name, gradient in now.items():
      gradient = gradient * min(1.0, settings.clip_norm / norm)
      first[name] = 0.9 * first[name] + 0.1 * gradient
      second[name] = 0.999 * second[name] + 0.001 * gradient**2
      mean = first[name] / (1 - 0.9 ** (step + 1))
      root = np.sqrt(second[name] / (1 - 0.999 ** (step + 1)))
      move = mean / (root + 1e-8)
      if "norm" not in name:
        move += settings.weight_decay * weights[name]
      scale = 0.2 if "vision" in name else 1.0
      weights[name] = weights[name] - settings.learning_rate * scale * rate * move
  return weights


def stepped(weights, gradients, settings, num_steps):
  """The same steps with our optimiser."""
  optimizer = make_optimizer(settings, num_steps)
  weights = {name: jnp.asarray(value) for name, value in weights.items()}
  state, update = optimizer.init(weights), jax.jit(optimizer.update)
  for now in gradients:
    updates, state = update(now, state, weights)
    weights = {name: value + updates[name] for name, value in weights.items()}
  return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_with_clipping_warm_up_and_scales_equals_a_plain_implementation(decay):
  settings = dataclasses.replace(ADAMW, learning_rate=0.01, warm_up=0.1, weight_decay=decay)
  rng = np.random.default_rng(0)
  weights = {name: rng.standard_normal((4, 5)).astype(np.float32) for name in PATHS}
  gradients = [
    {name: (rng.standard_normal((4, 5)) * size).astype(np.float32) for name in PATHS}
    for size in (0.01, 2.0, 0.1, 1.0, 0.03)
  ]
  found = stepped(weights, gradients, settings, 20)
  for name, expected in plain_adamw(weights, gradients, settings, 20).items():
    np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected - weights[name]).max() > 0.003


@pytest.mark.parametrize("config", [CONFIG, INTERN_VIDEO], ids=["umt", "internvideo2"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_all_weights_decay_but_biases_and_those_of_norms(name, config):
  def model_with_adapters():
    model = VideoChatFlash(config, rngs=nnx.Rngs(0))
    add_adapters(model, LoraConfig(rank=2, targets="proj|fc1"), nnx.Rngs(0))
    return model

  model = nnx.eval_shape(model_with_adapters)
  norms = {
    dotted_path(path)
    for path, module in nnx.iter_modules(model)
    if isinstance(module, RMSNorm | LayerNorm)
  }
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(nnx.state(model))
  )
  settings = dataclasses.replace(
    ADAMW, name=name, scales=(("", 1.0),), warm_up=0.0, learning_rate=0.1, weight_decay=0.5
  )
  optimizer = make_optimizer(settings, num_steps=9)

  @jax.jit
  def first_updates(weights):
    no_gradient = jax.tree.map(jnp.zeros_like, weights)
    return optimizer.update(no_gradient, optimizer.init(weights), weights)[0]

  updates = first_updates(weights)
  moved = {}
  for (path, weight), update in zip(
    jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(updates), strict=True
  ):
    path = dotted_path(path)
    moved[path] = path.rpartition(".")[0] not in norms and not path.endswith("bias")
    np.testing.assert_allclose(update, -0.1 * 0.5 * weight * moved[path], rtol=1e-5, err_msg=path)
  assert {path for path in moved if ".stacked.q_proj." in path and moved[path]} == {
    f"decoder.layers.stacked.q_proj.{name}" for name in ("kernel", "lora_a", "lora_b")
  }
  assert moved["decoder.embed_tokens.embedding"] and not moved["decoder.layers.stacked.q_proj.bias"]
  if config is INTERN_VIDEO:
    assert moved["vision.video_positions"] and moved["vision.blocks.stacked.mlp_scale"]


def test_the_state_has_the_tree_that_earlier_versions_saved():
  weights = {"norm": {"scale": jnp.ones(3)}, "fc1": {"kernel": jnp.ones((3, 3))}}
  settings = dataclasses.replace(ADAMW, weight_decay=0.1)
  adamw = optax.adamw(learning_rate_at(settings, 9), weight_decay=0.1)
  earlier = optax.chain(optax.clip_by_global_norm(1.0), adamw, optax.stateless(lambda x, _: x))
  ours, theirs = (x.init(weights) for x in (make_optimizer(settings, 9), earlier))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_the_rate_rises_and_falls_as_published():
  rate = learning_rate_at(ADAMW, 100)
  assert rate(0) == 0 and rate(100) == pytest.approx(0, abs=1e-12)
  assert rate(3) == pytest.approx(1e-5) and rate(1) == pytest.approx(1e-5 / 3)
  assert rate(51.5) == pytest.approx(0.5e-5)
  ends_high = dataclasses.replace(ADAMW, final=0.02)
  assert learning_rate_at(ends_high, 100)(100) == pytest.approx(2e-7)
  assert learning_rate_at(ADAMW, 1)(0) == pytest.approx(1e-5), "a run of one step is trained, too"


def test_the_first_expression_that_matches_a_path_counts():
  settings = dataclasses.replace(ADAMW, scales=(("vision", 0.2), ("norm", 3.0), ("", 0.0)))
  assert [scale_of(settings, path) for path in PATHS] == [0.2, 0.0, 3.0]
  is_trained = trained_paths(settings, PATHS)
  assert [is_trained(path) for path in PATHS] == [True, False, True]


@pytest.mark.parametrize(
  "scales, complaint",
  [
    ((("visoin", 0.2), ("", 1.0)), r"'visoin' is not the first match of any weight; .* vision\."),
    ((("", 1.0), ("vision", 0.2)), r"'vision' is not the first match of any weight"),
    ((("vision", 0.2), ("decoder", 1.0)), r"no expression matches the weight connector\.fc1"),
    ((("", 0.0),), "freezes all weights"),
  ],
)
def test_scales_that_miss_weights_or_freeze_all_of_them_are_refused(scales, complaint):
  settings = dataclasses.replace(ADAMW, scales=scales)
  with pytest.raises(InputError, match=complaint) as error:
    trained_paths(settings, PATHS)
  assert "\n" not in str(error.value)
