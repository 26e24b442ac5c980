"""Video-level HiCo: visual tokens are dropped between decoder layers, planned on the host.

One row of a text token, four visual ones and a question (`?`), half of the visual tokens to stay:

    row              s    v    v    v    v    ?
    index            0    1    2    3    4    5
    uniform          s    v              v    ?        kept [0, 1, 4, 5]
    attention gets        .1   .4   .2   .3
    attention        s         v         v    ?        kept [0, 2, 4, 5]

The layers below go on with four tokens, at positions 0 to 3. Text always stays, and every count is
known before anything is computed: `plan_dropout` makes the plan in numpy, with fixed shapes, and
`drop_tokens` follows it on the device. For another rule of selection, change `evenly_spaced` (by
place) or `visual_scores` (by what the model sees); all else follows from the counts.

Counts and rules are those of VideoChat-Flash (Li et al. 2025). Where the original takes one video a
row, here all visual tokens of a sample are one pool, and rows may hold any mixture: several images,
text alone, packed samples (segments), padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.ops.received_attention import received_attention
from videochat_flash_jax.ops.sharded_gather import sharded_gather
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array, Bool, Float, Int


class EvenDrop(NamedTuple):
  """Evenly spaced visual tokens stay.

  Attributes:
    slots: places in the row of all tokens that stay, rising; behind a row's last one, T.
  """

  slots: Int[Array | np.ndarray, "B S"]


class RankedDrop(NamedTuple):
  """The visual tokens stay that are attended to most.

  Attributes:
    slots: as of `EvenDrop`, once each sample is sorted: its text, then visual tokens by rank.
  """

  slots: Int[Array | np.ndarray, "B S"]


class DropoutPlan(NamedTuple):
  """All drops of a batch, and what they ask of its tokens.

  Attributes:
    segment_ids: sample of each token, from 1; 0 in the padding, which is at the end.
    is_visual: whether it is a visual token.
    learnt: in training, whether its label is learnt; None at inference.
    drops: by the first layer that sees fewer tokens.
  """

  segment_ids: Int[Array | np.ndarray, "B T"]
  is_visual: Bool[Array | np.ndarray, "B T"]
  learnt: Bool[Array | np.ndarray, "B T"] | None
  drops: dict[int, EvenDrop | RankedDrop]


def evenly_spaced(num_tokens: int, num_kept: int) -> np.ndarray:
  """Which of `num_tokens` stay: the first, the last, and evenly spaced ones between.

      evenly_spaced(10, 4) = [0, 3, 6, 9]     evenly_spaced(10, 1) = [0]

  The lower half is counted from the front and the upper from the back, in float64, as the
  original's linspace does; cutting off numpy's linspace gives other tokens for some sizes.
  """
  if num_kept < 2:
    return np.zeros(num_kept, np.int64)
  step = (num_tokens - 1) / (num_kept - 1)
  index = np.arange(num_kept)
  upwards, downwards = step * index, (num_tokens - 1) - step * (num_kept - 1 - index)
  return np.where(index < num_kept // 2, upwards, downwards).astype(np.int64)


def plan_dropout(
  config: DropoutConfig,
  is_visual: Bool[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
  learnt: Bool[np.ndarray, "B T"] | None = None,
  round_length: Callable[[int], int] = lambda length: length,
) -> DropoutPlan:
  """Plans on the host, where all counts are known, what is dropped from a batch.

  Of a sample's n visual tokens `int(n * ratio)` stay at each drop. In training, attention chooses
  only where there is an answer to learn; other samples keep what they have.

  Two samples in one row, `S v v v v . | S v v .`, half to stay, then a quarter by attention:

      segment_ids  1 1 1 1 1 1 2 2 2 2
      slots        0 1 4 5 6 7 9         uniform: places in the row
      slots        0 1 2 4 5             ranked: text 0, 1 and the best of 2, 3; text 4, 5 of 4-6

  Args:
    config: when, how many, and how.
    is_visual: which tokens are visual.
    segment_ids: sample of each token, from 1, one behind the other; 0 in the padding at the end.
    learnt: in training, which tokens' labels are learnt (not `IGNORE_LABEL`).
    round_length: gives the length to which rows are padded after a drop, at least what it is
      given: few different ones mean few compilations. By default the longest row's length.
  """
  batch, width = is_visual.shape
  rows = [
    _samples(is_visual[row], segment_ids[row], None if learnt is None else learnt[row])
    for row in range(batch)
  ]
  num_uniform = {"uniform": len(config.layers), "uniform0_attention": 1, "uniform1_attention": 2}
  drops: dict[int, EvenDrop | RankedDrop] = {}
  for number, (layer, ratio) in enumerate(zip(config.layers, config.ratios[1:], strict=True)):
    ranked = number >= num_uniform.get(config.kind, 0)
    stays, rows = zip(*[_drop_from_row(samples, ratio, ranked) for samples in rows], strict=True)
    length = round_length(max(map(len, stays)))
    slots = [np.pad(row, (0, length - len(row)), constant_values=width) for row in stays]
    drops[layer] = (RankedDrop if ranked else EvenDrop)(np.stack(slots).astype(np.int32))
    width = length
  return DropoutPlan(segment_ids, is_visual, learnt, drops)


class _Sample(NamedTuple):
  """The tokens that a sample has left, its first number of visual ones, and whether any asks."""

  is_visual: np.ndarray
  num_visual: int
  is_asked: bool

  def that_stay(self, ratio, ranked):
    """Which tokens stay; ranked ones are sorted, so that their counts tell."""
    visual = np.flatnonzero(self.is_visual)
    num_kept = int(self.num_visual * ratio)
    if not ranked:
      visual = visual[evenly_spaced(len(visual), num_kept)]
    elif self.is_asked:
      visual = visual[:num_kept]
    stays = ~self.is_visual
    stays[visual] = True
    return stays


def _samples(is_visual, segment_ids, learnt):
  samples = []
  edges = np.flatnonzero(np.diff(segment_ids)) + 1
  for tokens in np.split(np.arange(len(segment_ids)), edges):
    if segment_ids[tokens[0]] > 0:
      is_asked = learnt is None or (~learnt[tokens[:-1]] & learnt[tokens[1:]]).any()
      samples.append(_Sample(is_visual[tokens], int(is_visual[tokens].sum()), bool(is_asked)))
  return samples


def _drop_from_row(samples, ratio, ranked):
  """The slots of a row (see `EvenDrop`), and its samples after the drop."""
  if ranked:  # text first, then visual tokens by rank
    samples = [sample._replace(is_visual=np.sort(sample.is_visual)) for sample in samples]
  stays = [sample.that_stay(ratio, ranked) for sample in samples]
  left = [
    sample._replace(is_visual=sample.is_visual[kept])
    for sample, kept in zip(samples, stays, strict=True)
  ]
  return np.flatnonzero(np.concatenate([np.zeros(0, bool), *stays])), left


def every_token(plan: DropoutPlan) -> Int[Array, "B T"]:
  """What is left before any drop: each token's own index, and T in the padding."""
  length = plan.segment_ids.shape[1]
  return jnp.where(plan.segment_ids > 0, jnp.arange(length), length)


def drop_tokens(
  plan: DropoutPlan,
  drop: EvenDrop | RankedDrop,
  x: Float[Array, "B T D"],
  kept: Int[Array, "B T"],
  queries_and_keys: Callable,
  layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
  """Leaves out the tokens that a drop names; those that stay close up, evenly over all devices.

  Args:
    plan: of the batch.
    drop: one of the plan's.
    x: hidden states that enter the layer behind the drop, in the order of the layout, as below.
    kept: index of each token in its row before any drop; the row's first length in the padding.
    queries_and_keys: gives those of `x` in that layer, `[B, T, N, H]` and `[B, T, K, H]`.
    layout: how `x` lies on a mesh; all other arrays are in the order of the text.

  Returns:
    `x` and `kept` of the tokens that stay, zeros and the row's first length behind them.
  """
  places = drop.slots
  if isinstance(drop, RankedDrop):
    segment_ids = gather_tokens(plan.segment_ids, kept)
    learnt = None if plan.learnt is None else gather_tokens(plan.learnt, kept)
    scores = visual_scores(*queries_and_keys(x), segment_ids, learnt, layout)
    scores = jnp.where(gather_tokens(plan.is_visual, kept), scores, jnp.inf)
    order = _best_first(scores, _segment_starts(segment_ids))
    places = jnp.sort(gather_tokens(order, drop.slots, fill=x.shape[1]), axis=1)
  kept = gather_tokens(kept, places, fill=plan.is_visual.shape[1])
  return sharded_gather(x, places, layout), kept


def visual_scores(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"],
  learnt: Bool[Array, "B T"] | None,
  layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
  """How much each token matters: the attention it gets from those that ask (see `asking`).

  No gradient flows through the choice. `q` and `k` are in the order of the layout, all else in that
  of the text.
  """
  q, k = jax.lax.stop_gradient((q, k))
  asks, segment_ids = (layout.to_zigzag(x) for x in (asking(segment_ids, learnt), segment_ids))
  return layout.from_zigzag(received_attention(q, k, asks, segment_ids, layout))


def asking(segment_ids: Int[Array, "B T"], learnt: Bool[Array, "B T"] | None) -> Bool[Array, "B T"]:
  """The tokens behind which an answer begins.

  At inference the last of each segment. In training those that are not learnt while the next one
  is: learnt [- - a b - c] gives the second and the fifth. The original also takes a row's last
  token where its first one is learnt; nothing precedes that one, so here nothing asks for it.
  """
  last = segment_ids != jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
  if learnt is None:
    return last & (segment_ids > 0)
  return ~learnt & jnp.pad(learnt[:, 1:], ((0, 0), (0, 1))) & ~last


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Positions from 0 in each segment: [1 1 1 2 2 0] gives [0 1 2 0 1 0]."""
  return jnp.arange(segment_ids.shape[1]) - _segment_starts(segment_ids)


def _segment_starts(segment_ids):
  """Place of the first token of each token's segment: [1 1 1 2 2 0] gives [0 0 0 3 3 5]."""
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  first = jnp.where(segment_ids != before, jnp.arange(segment_ids.shape[1]), 0)
  return jax.lax.cummax(first, axis=1)


def _best_first(scores, starts):
  """Places of the tokens, segment by segment, by falling score; equal ones stay in their order."""
  places = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape)
  return jax.lax.sort((starts, -scores, places), dimension=1, is_stable=True, num_keys=2)[-1]
