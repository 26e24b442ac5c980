"""Losses of a model on a batch, as sums: those of parts of a batch, and of hosts, are added up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK_TOKENS = 512  # per device: only the logits of so many tokens are in memory at once


class Sums(NamedTuple):
  """A loss before it is divided by the number of its targets.

  Attributes:
    loss: sum of the losses of all targets.
    count: the number of targets.
    right: by name, the number of right answers.
  """

  loss: Float[Array, ""]
  count: Float[Array, ""]
  right: dict[str, Float[Array, ""]]

  def means(self) -> dict[str, Array]:
    """The mean `loss`, the share of right answers by name, and the number of `targets`."""
    count = jnp.maximum(self.count, 1)
    shares = {name: right / count for name, right in self.right.items()}
    return {"loss": self.loss / count, **shares, "targets": self.count}


def cross_entropy(
  logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The mean negative log-likelihood, and the share of right answers, of labels from 0."""
  learnt = labels >= 0
  count = jnp.maximum(learnt.sum(), 1)
  labels = jnp.maximum(labels, 0)
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - chosen
  right = logits.argmax(axis=-1) == labels
  return jnp.where(learnt, losses, 0).sum() / count, (right & learnt).sum() / count


def next_token_loss(
  decoder: Qwen2, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], layout: Layout
) -> Sums:
  """The cross-entropy of next tokens, a block of tokens at a time.

  The logits of all tokens would take more memory than everything else: 32,768 tokens and a
  vocabulary of 152,064 take 20 GB. The vocabulary of a block's logits is split over `tensor`, and
  they are computed a second time for the gradient.

  Args:
    decoder: its head gives the logits.
    hidden: its hidden states.
    targets: the next token of each token, or IGNORE_LABEL.
    layout: how rows and tokens are sharded over a mesh.
  """
  head = {"decoder": {"lm_head": {"kernel": decoder.head}}}
  dtype = layout.products_in(decoder.head)

  def sums_of_shard(head, hidden, targets):
    """The loss and the right answers of this device's tokens, each [1, 1]."""
    # Gathered here, once, so that its gradient, too, is summed over devices once, not per block.
    kernel = layout.gather_shards(head)["decoder"]["lm_head"]["kernel"]
    blocks = _token_blocks(hidden, targets)

    @jax.checkpoint
    def add_block(sums, block):
      """Adds the sums of one block."""
      return jax.tree.map(jnp.add, sums, _block_sums(kernel.astype(dtype), *block, layout)), None

    sums, _ = jax.lax.scan(add_block, (jnp.zeros(()), jnp.zeros((), jnp.int32)), blocks)
    return jax.tree.map(lambda x: x[None, None], sums)

  tokens = ("batch", "sequence")
  sums = layout.shard_map(sums_of_shard, (head, tokens, tokens), tokens)(head, hidden, targets)
  loss, right, learnt = sums[0].sum(), sums[1].sum(), (targets >= 0).sum()
  return Sums(loss, learnt.astype(jnp.float32), {"answer_tokens": right.astype(jnp.float32)})


def _token_blocks(hidden, targets):
  """Splits a device's tokens: hidden states [blocks, block, D] and targets [blocks, block]."""
  block = min(_BLOCK_TOKENS, targets.size)
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  padding = -len(targets) % block
  hidden = jnp.pad(hidden, [(0, padding), (0, 0)])
  targets = jnp.pad(targets, (0, padding), constant_values=IGNORE_LABEL)
  return hidden.reshape(-1, block, hidden.shape[-1]), targets.reshape(-1, block)


def _block_sums(kernel, hidden, targets, layout):
  """The sum of the losses and the number of right answers of a block of tokens."""
  logits = jnp.einsum("td,dv->tv", hidden, kernel, preferred_element_type=jnp.float32)
  highest = jax.lax.stop_gradient(logits).max(axis=-1)
  highest = layout.reduce_over(jax.lax.pmax, highest, "vocabulary")
  total = jnp.exp(logits - highest[:, None]).sum(axis=-1)
  total = layout.reduce_over(jax.lax.psum, total, "vocabulary")
  # A look-up of the target's logit would gather the whole vocabulary on every device.
  is_target = layout.vocab_ids(kernel.shape[1]) == targets[:, None]
  chosen = jnp.where(is_target, logits, 0).sum(axis=-1)
  chosen = layout.reduce_over(jax.lax.psum, chosen, "vocabulary")
  learnt = targets >= 0
  losses = jnp.where(learnt, highest + jnp.log(total) - chosen, 0)
  return losses.sum(), (learnt & (chosen >= highest)).sum()


def answer_loss(
  model: VideoChatFlash, batch: dict[str, Array], layout: Layout = ONE_DEVICE
) -> Sums:
  """The cross-entropy of the answers in packed conversations about videos.

  Args:
    model: encoder, connector and decoder.
    batch: `frames [B, C, F, S, S, 3]` and perhaps `tiles [B, I, 1, S, S, 3]` of images; or what a
      frozen encoder made of them, `features [B, C, V, E]` and `tile_features [B, I, V, E]`. In
      addition, `[B, T]` each: `token_ids`, `labels` (of the token itself, IGNORE_LABEL where it is
      not learnt), `visual_index`, `positions`, `segment_ids`. With a `dropout`
      (`models.token_dropout.DropoutPlan`), visual tokens are dropped by that plan, and without
      `positions` these are counted from 0 in each segment.
    layout: how the batch is sharded over a mesh.
  """
  if "features" in batch:
    visual_tokens = model.project_rows(batch["features"], layout, batch.get("tile_features"))
  else:
    visual_tokens = model.encode_rows(batch["frames"], layout, batch.get("tiles"))
  return sequence_loss(model, visual_tokens, batch, layout)


def sequence_loss(
  model: VideoChatFlash,
  visual_tokens: Float[Array, "B V D"],
  batch: dict[str, Array],
  layout: Layout = ONE_DEVICE,
) -> Sums:
  """`answer_loss` with visual tokens in place of frames."""
  sequence = batch["token_ids"], visual_tokens, batch["visual_index"]
  labels, segment_ids = batch["labels"], batch["segment_ids"]
  if "dropout" in batch:
    plan, positions = batch["dropout"], batch.get("positions")
    hidden, kept = model.read_and_drop(*sequence, plan, layout, positions)
    kept = layout.from_zigzag(kept)
    labels = gather_tokens(layout.from_zigzag(labels), kept, fill=IGNORE_LABEL)
    segment_ids = gather_tokens(layout.from_zigzag(segment_ids), kept)
  else:
    hidden = model(*sequence, positions=batch["positions"], segment_ids=segment_ids, layout=layout)
    labels, segment_ids = layout.from_zigzag(labels), layout.from_zigzag(segment_ids)
  # The first token of a segment is no target: the token before it belongs to another segment.
  follows = segment_ids[:, 1:] == segment_ids[:, :-1]
  targets = jnp.where(follows, labels[:, 1:], IGNORE_LABEL)
  targets = jnp.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORE_LABEL)
  return next_token_loss(model.decoder, hidden, layout.to_zigzag(targets), layout)
