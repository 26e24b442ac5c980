"""Losses: a model and a batch to sums, so that batches in parts and on many hosts add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.token_merging import merge_groups, similarity_features, sum_groups
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Float, Int

_BLOCK_TOKENS = 512  # of a device, whose logits are in memory at a time


class Sums(NamedTuple):
  """A loss that is not yet divided by how much counts in it.

  Attributes:
    loss: summed over all that counts.
    count: how much that is.
    right: by name, how many answers are right.
  """

  loss: Float[Array, ""]
  count: Float[Array, ""]
  right: dict[str, Float[Array, ""]]

  def means(self) -> dict[str, Array]:
    """The mean `loss`, shares of right answers by their names, and of how many `targets`."""
    count = jnp.maximum(self.count, 1)
    shares = {name: right / count for name, right in self.right.items()}
    return {"loss": self.loss / count, **shares, "targets": self.count}


def add_heads(model: VideoChatFlash, num_classes: dict[str, int], rngs: nnx.Rngs):
  """Gives a model linear heads that say what each patch shows: to train its encoder alone.

  Stands in for what a released encoder learnt before it met a decoder.

  Args:
    model: gets `heads`: field of the batch that holds the labels -> head over its classes.
    num_classes: for each head.
    rngs: what its weights are drawn from.
  """
  width = model.config.vision.width
  model.heads = nnx.Dict(
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


def patch_loss(model: VideoChatFlash, batch: dict[str, Array]) -> Sums:
  """How badly the heads of a model name what patches show, before and after they are merged.

  Each patch is named twice: from its own feature, and from the merged token that it ends in. Where
  a token holds patches of a thing and bare ones, only the former are asked: the token is to tell
  of the thing, however few its patches are.

  Args:
    model: with heads, see `add_heads`.
    batch: `frames [C, F, S, S, 3]`, and labels `[C, P]` for every head; the last class is
      "nothing".

  Returns:
    Sums whose means are the loss and, for each head, the share of right answers about patches that
    show something, after merging; each patch is a target.
  """
  connector = model.connector
  features = model.encode_patches(batch["frames"])
  metric = jax.lax.stop_gradient(similarity_features(features, connector.config.merge_heads))
  group = merge_groups(metric, target=connector.config.clip_tokens)
  merged = jnp.take_along_axis(connector.merge(features), group[..., None], axis=1)
  total, right = jnp.zeros(()), {}
  for name, head in model.heads.items():
    labels, nothing = batch[name], head.out_features - 1
    shown = jnp.where(labels == nothing, IGNORE_LABEL, labels)
    num_shown = sum_groups(1.0 * (shown >= 0)[..., None], group, connector.config.clip_tokens)
    beside = jnp.take_along_axis(num_shown[..., 0], group, axis=1) > 0
    bare = jnp.where(labels == nothing, labels, IGNORE_LABEL)
    bare_alone = jnp.where(beside, IGNORE_LABEL, bare)
    for x, without in ((features, bare), (merged, bare_alone)):
      logits = head(x)
      loss, right[name] = cross_entropy(logits, shown)
      # Bare patches fill most of a picture: half the weight for them together.
      total += 0.5 * loss + 0.25 * cross_entropy(logits, without)[0]
  count = jnp.asarray(group.size, jnp.float32)
  return Sums(total * count, count, {name: share * count for name, share in right.items()})


def next_token_loss(
  decoder: Qwen2, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], layout: Layout
) -> Sums:
  """Negative log-likelihoods of tokens by a decoder's logits, a block of tokens at a time.

  The logits of all tokens would take more memory than all else: 32,768 tokens and 152,064 words are
  20 GB. Those of a block are split over `tensor` by words, and computed again for the gradient.

  Args:
    decoder: scores the tokens.
    hidden: its hidden states.
    targets: the token that follows each, or IGNORE_LABEL.
    layout: how rows and tokens lie on a mesh.
  """
  head = {"decoder": {"lm_head": {"kernel": decoder.head}}}

  def sums_of_shard(head, hidden, targets):
    # Gathered here, once, and its gradient is summed over devices once, not for each block.
    kernel = layout.gather_shards(head)["decoder"]["lm_head"]["kernel"]
    # A scan sums a gradient in the dtype of what it is of; many small blocks are lost in bfloat16.
    precise, dtype = kernel.astype(jnp.float32), kernel.dtype
    blocks = _token_blocks(hidden, targets)

    @jax.checkpoint
    def add_block(sums, block):
      return jax.tree.map(jnp.add, sums, _block_sums(precise.astype(dtype), *block, layout)), None

    sums, _ = jax.lax.scan(add_block, (jnp.zeros(()), jnp.zeros((), jnp.int32)), blocks)
    return jax.tree.map(lambda x: x[None, None], sums)

  tokens = ("batch", "sequence")
  sums = layout.shard_map(sums_of_shard, (head, tokens, tokens), tokens)(head, hidden, targets)
  loss, right, learnt = sums[0].sum(), sums[1].sum(), (targets >= 0).sum()
  return Sums(loss, learnt.astype(jnp.float32), {"answer_tokens": right.astype(jnp.float32)})


def _token_blocks(hidden, targets):
  """Hidden states [blocks, block, D] and targets [blocks, block] of a device, padded."""
  block = min(_BLOCK_TOKENS, targets.size)
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  padding = -len(targets) % block
  hidden = jnp.pad(hidden, [(0, padding), (0, 0)])
  targets = jnp.pad(targets, (0, padding), constant_values=IGNORE_LABEL)
  return hidden.reshape(-1, block, hidden.shape[-1]), targets.reshape(-1, block)


def _block_sums(kernel, hidden, targets, layout):
  """Sum of the losses, and number of right answers, of a block of tokens."""
  logits = jnp.einsum("td,dv->tv", hidden, kernel, preferred_element_type=jnp.float32)
  highest = jax.lax.stop_gradient(logits).max(axis=-1)
  highest = layout.reduce_over(jax.lax.pmax, highest, "vocabulary")
  total = jnp.exp(logits - highest[:, None]).sum(axis=-1)
  total = layout.reduce_over(jax.lax.psum, total, "vocabulary")
  # A sum over all words and no look-up, which would bring the words of all devices together.
  is_target = layout.vocab_ids(kernel.shape[1]) == targets[:, None]
  chosen = jnp.where(is_target, logits, 0).sum(axis=-1)
  chosen = layout.reduce_over(jax.lax.psum, chosen, "vocabulary")
  learnt = targets >= 0
  losses = jnp.where(learnt, highest + jnp.log(total) - chosen, 0)
  return losses.sum(), (learnt & (chosen >= highest)).sum()


def answer_loss(
  model: VideoChatFlash, batch: dict[str, Array], layout: Layout = ONE_DEVICE
) -> Sums:
  """How badly a model continues packed conversations about videos.

  Args:
    model: encoder, connector and decoder.
    batch: `frames [B, C, F, S, S, 3]`, perhaps `tiles [B, I, 1, S, S, 3]` of images, or, of a
      frozen encoder, `features [B, C, V, E]` and `tile_features [B, I, V, E]`; and `[B, T]`:
      `token_ids`, `labels` (of the token itself, IGNORE_LABEL where it is not learnt),
      `visual_index`, `positions`, `segment_ids`. With a `dropout`
      (`models.token_dropout.DropoutPlan`), visual tokens are dropped by that plan.
    layout: how all of it lies on a mesh.
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
  """`answer_loss` of videos that are encoded already."""
  sequence = batch["token_ids"], visual_tokens, batch["visual_index"]
  labels, segment_ids = batch["labels"], batch["segment_ids"]
  if "dropout" in batch:
    hidden, kept = model.read_and_drop(*sequence, batch["dropout"], layout)
    kept = layout.from_zigzag(kept)
    labels = gather_tokens(layout.from_zigzag(labels), kept, fill=IGNORE_LABEL)
    segment_ids = gather_tokens(layout.from_zigzag(segment_ids), kept)
  else:
    hidden = model(*sequence, positions=batch["positions"], segment_ids=segment_ids, layout=layout)
    labels, segment_ids = layout.from_zigzag(labels), layout.from_zigzag(segment_ids)
  # The token before the first one of a segment knows nothing of it.
  follows = segment_ids[:, 1:] == segment_ids[:, :-1]
  targets = jnp.where(follows, labels[:, 1:], IGNORE_LABEL)
  targets = jnp.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORE_LABEL)
  return next_token_loss(model.decoder, hidden, layout.to_zigzag(targets), layout)
