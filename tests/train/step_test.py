"""The step: only what is named is trained, and a batch is learnt."""

import jax
import numpy as np
from flax import nnx

from tests.train.losses_test import answer_batch
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.optimizer import make_optimizer
from videochat_flash_jax.train.step import make_step, split_state


def test_a_batch_is_learnt_while_frozen_weights_stay():
  model = VideoChatFlash(VideoChatFlashConfig.tiny(), rngs=nnx.Rngs(0))
  optimizer = make_optimizer(num_steps=20, peak_rate=0.01)
  graph, state = split_state(model, ("connector", "decoder"), optimizer)
  assert set(state.trained) == {"connector", "decoder"} and set(state.frozen) == {"vision"}
  before = jax.tree.map(np.asarray, state)
  step = make_step(graph, answer_loss, optimizer)
  batch = answer_batch()
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.1 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trained, before.trained)
  assert all(jax.tree.leaves(moved))
