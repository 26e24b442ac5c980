"""Losses: which tokens count, and which do not."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.models.small_models import CONFIG, DECODER, fill_randomly
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import ONE_DEVICE
from videochat_flash_jax.train import losses


def test_cross_entropy_is_the_mean_over_learnt_positions():
  logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
  labels = jnp.array([0, 2, IGNORE_LABEL])
  loss, right = losses.cross_entropy(logits, labels)
  expected = [np.log(np.exp(2) + 2) - 2, np.log(np.e + 2)]
  np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
  assert right == 0.5


def test_cross_entropy_without_targets_is_zero():
  loss, right = losses.cross_entropy(jnp.ones((2, 3)), jnp.full(2, IGNORE_LABEL))
  assert loss == 0 and right == 0


def test_gradients_of_many_blocks_are_summed_in_float32(monkeypatch):
  monkeypatch.setattr(losses, "_BLOCK_TOKENS", 1)
  hidden = jnp.ones((1, 600, 8), jnp.bfloat16)
  targets = jnp.zeros((1, 600), jnp.int32)

  def loss(head):
    decoder = types.SimpleNamespace(head=head)
    return losses.next_token_loss(decoder, hidden, targets, ONE_DEVICE).means()["loss"]

  gradient = quick_jit(jax.grad(loss))(jnp.zeros((8, 4), jnp.bfloat16)).astype(jnp.float32)
  np.testing.assert_allclose(gradient, np.tile([-0.75, 0.25, 0.25, 0.25], (8, 1)), rtol=0.01)


def answer_batch():
  """One row: two segments of a clip, an answer and its end, then padding."""
  rng = np.random.default_rng(0)
  token_ids = rng.integers(5, 700, (1, 48)).astype(np.int32)
  visual_index = np.full((1, 48), -1, np.int32)
  visual_index[0, 2:18] = np.arange(16)
  visual_index[0, 22:38] = np.arange(16, 32)
  labels = np.full((1, 48), IGNORE_LABEL, np.int32)
  labels[0, [19, 39]] = token_ids[0, [19, 39]]
  batch = {
    "frames": rng.integers(0, 255, (1, 2, 4, 32, 32, 3)).astype(np.uint8),
    "token_ids": token_ids,
    "labels": labels,
    "visual_index": visual_index,
    "positions": np.concatenate([np.arange(20), np.arange(20), np.arange(8)])[None],
    "segment_ids": np.repeat([1, 2, 0], [20, 20, 8])[None],
  }
  return {name: jnp.asarray(value) for name, value in batch.items()}


def test_the_answer_loss_depends_neither_on_later_tokens_nor_on_padding():
  model = VideoChatFlash(VideoChatFlashConfig.tiny(), rngs=nnx.Rngs(0))
  batch = answer_batch()
  loss = quick_jit(functools.partial(losses.answer_loss, model))
  means = loss(batch).means()
  assert np.isfinite(means["loss"]) and 0 <= means["answer_tokens"] <= 1 and means["targets"] == 2
  unseen = jnp.array([19, *range(39, 48)])
  changed = {**batch, "token_ids": batch["token_ids"].at[0, unseen].add(1)}
  unchanged = loss(changed).means()["loss"]
  np.testing.assert_allclose(unchanged, means["loss"], rtol=1e-5)


def samples_with_tokens():
  """Two samples whose first token is learnt, with their visual tokens."""
  rng = np.random.default_rng(0)
  samples = []
  for num_visual, num_text in ((12, 9), (7, 6)):
    length = num_visual + num_text
    visual_index = np.full(length, -1, np.int32)
    visual_index[2 : 2 + num_visual] = np.arange(num_visual)
    token_ids = rng.integers(5, DECODER.vocab_size, length).astype(np.int32)
    labels = np.where(np.isin(np.arange(length), [0, length - 3, length - 1]), token_ids, -100)
    tokens = rng.standard_normal((num_visual, DECODER.width), np.float32)
    samples.append(
      ({"token_ids": token_ids, "visual_index": visual_index, "labels": labels}, tokens)
    )
  return samples


def packed(samples, dropout, padding=4):
  """One row of samples and padding, as `sequence_loss` expects it."""
  fields, tokens = zip(*samples, strict=True)
  lengths = [len(sample["token_ids"]) for sample in fields]
  ends = ((0, padding),)
  row = {
    name: np.concatenate([sample[name] for sample in fields]) for name in ("token_ids", "labels")
  }
  row = {name: np.pad(value, ends, constant_values=IGNORE_LABEL) for name, value in row.items()}
  counts = np.cumsum([0, *map(len, tokens)])
  index = [np.where(sample["visual_index"] < 0, -1, sample["visual_index"] + count)
           for sample, count in zip(fields, counts, strict=False)]  # fmt: skip
  row["visual_index"] = np.pad(np.concatenate(index), ends, constant_values=-1)
  row["segment_ids"] = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
  row["positions"] = np.concatenate([*map(np.arange, lengths), np.arange(padding)])
  batch = {name: value[None].astype(np.int32) for name, value in row.items()}
  if dropout is not None:
    is_visual, learnt = batch["visual_index"] >= 0, batch["labels"] >= 0
    batch["dropout"] = plan_dropout(dropout, is_visual, batch["segment_ids"], learnt)
  return jnp.asarray(np.concatenate(tokens))[None], jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
  "dropout",
  [
    pytest.param(None, id="all"),
    pytest.param(
      DropoutConfig("uniform0_attention", (1, 2), (1.0, 0.7, 0.3)), id="few", marks=pytest.mark.slow
    ),
  ],
)
def test_packed_samples_have_the_same_losses_and_gradients_as_single_ones(dropout):
  model = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0)))
  graph, weights = nnx.split(model)

  @quick_jit
  @jax.value_and_grad
  def loss(weights, visual_tokens, batch):
    sums = losses.sequence_loss(nnx.merge(graph, weights), visual_tokens, batch)
    return sums.means()["loss"]

  samples = samples_with_tokens()
  together = loss(weights, *packed(samples, dropout))
  first, second = (loss(weights, *packed([sample], dropout)) for sample in samples)
  # Each sample has two targets: its first token has no token before it.
  mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
  jax.tree.map(lambda a, b: assert_close(a, b, relative=5e-5), together, mean)


def test_positions_with_jumps_count_with_token_dropout_too():
  """Where nothing is dropped, the loss is that without token dropout."""
  model = fill_randomly(lambda: VideoChatFlash(CONFIG, rngs=nnx.Rngs(0)))
  nothing = DropoutConfig("uniform", (1,), (1.0, 1.0))
  found = []
  for dropout in (None, nothing):
    for jump in (0, 40):
      tokens, batch = packed(samples_with_tokens(), dropout)
      jumps = jnp.where(jnp.arange(batch["positions"].shape[1]) % 21 > 15, jump, 0)
      batch["positions"] += jumps
      loss = quick_jit(functools.partial(losses.sequence_loss, model))
      found.append(float(loss(tokens, batch).loss))
  assert found[2:] == pytest.approx(found[:2], rel=1e-5)
  assert abs(found[1] - found[0]) > 1e-3
