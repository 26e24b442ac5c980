"""Losses: a model and a batch to a number, with metrics beside it."""

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.data.conversation import IGNORE_LABEL
from videochat_flash_jax.models.token_merging import merge_groups, similarity_features, sum_groups
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.shapes import Array, Float, Int

Metrics = dict[str, Array]


class PatchProbe(nnx.Module):
  """A model with linear heads that say what each patch shows: to train its encoder alone.

  Stands in for what a released encoder learnt before it met a decoder.

  Attributes:
    model: whose `vision` is trained.
    heads: field of the batch that holds the labels -> head over its classes.
  """

  def __init__(self, model: VideoChatFlash, num_classes: dict[str, int], *, rngs: nnx.Rngs):
    self.model = model
    width = model.config.vision.width
    self.heads = nnx.Dict(
      {name: nnx.Linear(width, classes, rngs=rngs) for name, classes in num_classes.items()}
    )


def cross_entropy(
  logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean negative log-likelihood, and the share of right answers, where labels are not ignored."""
  learnt = labels >= 0
  count = jnp.maximum(learnt.sum(), 1)
  labels = jnp.maximum(labels, 0)
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - chosen
  right = logits.argmax(axis=-1) == labels
  return jnp.where(learnt, losses, 0).sum() / count, (right & learnt).sum() / count


def patch_loss(probe: PatchProbe, batch: dict[str, Array]) -> tuple[Array, Metrics]:
  """How badly the heads of a probe name what patches show, before and after they are merged.

  Each patch is named twice: from its own feature, and from the merged token that it ends in. Where
  a token holds patches of a thing and bare ones, only the former are asked: the token is to tell
  of the thing, however few its patches are.

  Args:
    probe: encoder and heads.
    batch: `frames [C, F, S, S, 3]`, and labels `[C, P]` for every head; the last class is
      "nothing".

  Returns:
    The loss, and for each head the share of right answers about patches that show something,
    after merging.
  """
  connector = probe.model.connector
  features = probe.model.encode_patches(batch["frames"])
  metric = jax.lax.stop_gradient(similarity_features(features, connector.config.merge_heads))
  group = merge_groups(metric, target=connector.config.clip_tokens)
  merged = jnp.take_along_axis(connector.merge(features), group[..., None], axis=1)
  total, metrics = jnp.zeros(()), {}
  for name, head in probe.heads.items():
    labels, nothing = batch[name], head.out_features - 1
    shown = jnp.where(labels == nothing, IGNORE_LABEL, labels)
    num_shown = sum_groups(1.0 * (shown >= 0)[..., None], group, connector.config.clip_tokens)
    beside = jnp.take_along_axis(num_shown[..., 0], group, axis=1) > 0
    bare = jnp.where(labels == nothing, labels, IGNORE_LABEL)
    bare_alone = jnp.where(beside, IGNORE_LABEL, bare)
    for x, without in ((features, bare), (merged, bare_alone)):
      logits = head(x)
      loss, metrics[name] = cross_entropy(logits, shown)
      # Bare patches fill most of a picture: half the weight for them together.
      total += 0.5 * loss + 0.25 * cross_entropy(logits, without)[0]
  return total, metrics


def answer_loss(model: VideoChatFlash, batch: dict[str, Array]) -> tuple[Array, Metrics]:
  """How badly a model continues packed conversations about videos.

  Args:
    model: encoder, connector and decoder.
    batch: `frames [B, C, F, S, S, 3]`, and `[B, T]`: `token_ids`, `labels` (of the token itself,
      IGNORE_LABEL where it is not learnt), `visual_index`, `positions`, `segment_ids`.
  """
  rows, clips = batch["frames"].shape[:2]
  visual_tokens = model.encode(batch["frames"].reshape(rows * clips, *batch["frames"].shape[2:]))
  hidden = model(
    batch["token_ids"],
    visual_tokens.reshape(rows, -1, visual_tokens.shape[-1]),
    batch["visual_index"],
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
  )
  loss, right = cross_entropy(model.decoder.logits(hidden[:, :-1]), batch["labels"][:, 1:])
  return loss, {"answer_tokens": right}
