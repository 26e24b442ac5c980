"""The step: it trains only the chosen weights, learns a batch, and adds up its parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import CONFIG, fill_randomly
from tests.train.losses_test import answer_batch
from tests.train.optimizer_test import ADAMW
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train.losses import Sums, answer_loss
from videochat_flash_jax.train.optimizer import make_optimizer
from videochat_flash_jax.train.step import make_evaluation, make_step, split_state

MUON = dataclasses.replace(ADAMW, name="muon", learning_rate=0.01, warm_up=0.05, final=0.02)


def test_steps_learn_a_batch_and_do_not_change_frozen_weights():
  model = VideoChatFlash(VideoChatFlashConfig.tiny(), rngs=nnx.Rngs(0))
  optimizer = make_optimizer(MUON, num_steps=20)
  graph, state = split_state(model, lambda path: not path.startswith("vision."), optimizer)
  assert set(state.trained) == {"connector", "decoder"} and set(state.frozen) == {"vision"}
  before = jax.tree.map(np.asarray, state)
  step = make_step(graph, answer_loss, optimizer)
  batch = answer_batch()
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.1 * losses[0] and metrics["grad_norm"] > 0 and metrics["targets"] == 2
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trained, before.trained)
  assert all(jax.tree.leaves(moved))


def four_rows():
  """Rows with 1, 2, 11 and 3 targets."""
  row = answer_batch()
  batch = {name: jnp.concatenate([value] * 4) for name, value in row.items()}
  labels = np.full((4, 48), IGNORE_LABEL, np.int32)
  for number, learnt in enumerate(([19], [19, 39], [18, 19, *range(24, 33)], [18, 19, 39])):
    labels[number, learnt] = (np.asarray(batch["token_ids"]) % 60 + number)[number, learnt]
  small = CONFIG.decoder.vocab_size
  batch |= {"labels": jnp.asarray(labels % small), "token_ids": batch["token_ids"] % small}
  batch["labels"] = jnp.where(labels >= 0, batch["labels"], IGNORE_LABEL)
  tokens = CONFIG.connector.clip_tokens  # of each of two clips
  is_visual = (batch["visual_index"] >= 0) & (batch["visual_index"] < 2 * tokens)
  return batch | {"visual_index": jnp.where(is_visual, batch["visual_index"], -1)}


@pytest.mark.parametrize("what", ["loss", "gradient", "nothing"])
def test_a_step_that_is_not_finite_changes_no_bit_of_the_state(what):
  """The square root of 0 is finite, and its gradient is not."""
  bad = {"loss": jnp.nan, "gradient": 0.0, "nothing": 1.0}[what]
  settings = dataclasses.replace(ADAMW, weight_decay=0.1, scales=(("", 1.0),), warm_up=0.0)
  optimizer = make_optimizer(settings, 9)
  module = nnx.Linear(3, 2, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))

  def loss(module, batch):
    value = jnp.abs(module(batch["x"]).sum()) + jnp.sqrt(batch["bad"] * module.bias[0])
    return Sums(value, jnp.ones(()), {})

  graph, state = split_state(module, lambda path: True, optimizer)
  step = make_step(graph, loss, optimizer)
  for number, (value, is_equal) in enumerate([(1.0, False), (bad, what != "nothing")]):
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, {"x": jnp.ones((1, 3)), "bad": jnp.asarray(value)})
    assert np.isfinite(metrics["loss"]) == (what != "loss" or number == 0)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True)
    same = [np.array_equal(old, new) for old, new in pairs]
    assert all(same) if is_equal else not any(same)


WITH_AND_WITHOUT_DROPOUT = pytest.mark.parametrize(
  "dropout",
  [
    pytest.param(False, id="all tokens"),
    pytest.param(True, id="dropout", marks=pytest.mark.slow),
  ],
)


def with_dropout(batch):
  dropout = DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25))
  fields = [np.asarray(batch[name]) for name in ("visual_index", "segment_ids", "labels")]
  plan = plan_dropout(dropout, fields[0] >= 0, fields[1], fields[2] >= 0)
  return batch | {"dropout": jax.tree.map(jnp.asarray, plan)}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True], ids=["all tokens", "dropout"])
def test_accumulation_over_parts_of_a_batch_gives_the_same_step(dropout):
  batch = with_dropout(four_rows()) if dropout else four_rows()
  results = []
  for accumulate in (1, 2):
    model = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0)))
    optimizer = optax.sgd(1.0)  # whose updates are the gradients
    graph, state = split_state(model, lambda path: True, optimizer)
    before = jax.tree.map(np.asarray, state.trained)
    evaluated = make_evaluation(graph, answer_loss, accumulate=accumulate)(state, batch)
    state, metrics = make_step(graph, answer_loss, optimizer, accumulate=accumulate)(state, batch)
    results.append((metrics, jax.tree.map(lambda a, b: b - np.asarray(a), state.trained, before)))
    assert metrics["targets"] == 17
    for name, value in evaluated.items():
      assert_close(value, metrics[name], relative=1e-6)
  (whole, gradients), (parts, summed) = results
  for name, value in whole.items():
    assert_close(parts[name], value, relative=1e-5)
  jax.tree.map(functools.partial(assert_close, relative=1e-5), summed, gradients)


_MLP = ("gate_proj.kernel", "up_proj.kernel", "down_proj.kernel")


def temporary_bytes_per_layer(is_trained, batch):
  """How much temporary memory a step needs per layer of the decoder, in sizes of a layer."""

  def temporary_bytes(depth):
    decoder = dataclasses.replace(CONFIG.decoder, mlp_width=2048, depth=depth)
    config, optimizer = dataclasses.replace(CONFIG, decoder=decoder), optax.sgd(1e-3)

    def start():
      model = VideoChatFlash(config, rngs=nnx.Rngs(0))
      stack = "decoder.layers.stacked."
      model.decoder.layers.frozen = frozenset(x for x in _MLP if not is_trained(stack + x))
      return split_state(model, is_trained, optimizer)

    graph, state = jax.eval_shape(start)
    lowered = make_step(graph, answer_loss, optimizer).lower(state, batch)
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes

  layer = 4 * len(_MLP) * 2048 * CONFIG.decoder.width
  return (temporary_bytes(12) - temporary_bytes(4)) / 8 / layer


@WITH_AND_WITHOUT_DROPOUT
def test_frozen_weights_need_no_memory_for_gradients(dropout):
  batch = with_dropout(four_rows()) if dropout else four_rows()
  assert temporary_bytes_per_layer(lambda path: path.startswith("connector."), batch) < 0.2


@pytest.mark.slow
def test_trained_weights_need_memory_for_gradients():
  assert temporary_bytes_per_layer(lambda path: True, four_rows()) > 0.9
