"""Video-level HiCo: visual tokens are dropped between decoder layers, by a plan from the host.

A row with a text token, four visual tokens and a question (`?`), where half of the visual tokens
are kept:

    row                      s    v    v    v    v    ?
    index                    0    1    2    3    4    5
    kept by `uniform`        s    v              v    ?        [0, 1, 4, 5]
    attention from `?`            .1   .4   .2   .3
    kept by `attention`      s         v         v    ?        [0, 2, 4, 5]

The next layers read four tokens, at positions 0 to 3. Text is always kept, so the number of kept
tokens is known before anything is computed: `plan_dropout` makes the plan in numpy, with fixed
shapes, and `drop_tokens` follows it on the device. For another rule of selection, change
`evenly_spaced` (which depends on the index alone) or `visual_scores` (which depends on what the
model reads). The rest follows from the counts.

Counts and rules are those of VideoChat-Flash (Li et al. 2025). The original takes one video per
row. Here all visual tokens of a sample are ranked together, and rows may hold any mixture: several
images, text alone, packed samples (segments), padding.
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
  """A drop that keeps evenly spaced visual tokens.

  Attributes:
    indices: indices in the row, before the drop, of all kept tokens, in rising order. Rows with
      fewer than S kept tokens are padded with T.
  """

  indices: Int[Array | np.ndarray, "B S"]


class RankedDrop(NamedTuple):
  """A drop that keeps the visual tokens with the highest scores.

  Attributes:
    indices: as in `EvenDrop`, but in a row whose samples are sorted: first a sample's text, then
      its visual tokens by falling score.
  """

  indices: Int[Array | np.ndarray, "B S"]


class DropoutPlan(NamedTuple):
  """All drops of a batch.

  Attributes:
    segment_ids: sample of each token, counted from 1; 0 in the padding at the end of a row.
    is_visual: which tokens are visual.
    learnt: in training, which tokens have a label that is learnt; None at inference.
    drops: each drop by the index of the first layer after it.
  """

  segment_ids: Int[Array | np.ndarray, "B T"]
  is_visual: Bool[Array | np.ndarray, "B T"]
  learnt: Bool[Array | np.ndarray, "B T"] | None
  drops: dict[int, EvenDrop | RankedDrop]


def evenly_spaced(num_tokens: int, num_kept: int) -> np.ndarray:
  """Indices of `num_kept` out of `num_tokens`: the first, the last, and evenly spaced ones between.

      evenly_spaced(10, 4) = [0, 3, 6, 9]     evenly_spaced(10, 1) = [0]

  As in the original's linspace, the lower half is computed from the front and the upper half from
  the back, in float64. Rounding down numpy's linspace gives other indices for some sizes.
  """
  if num_kept < 2:
    return np.zeros(num_kept, np.int64)
  step = (num_tokens - 1) / (num_kept - 1)
  index = np.arange(num_kept)
  from_front, from_back = step * index, (num_tokens - 1) - step * (num_kept - 1 - index)
  return np.where(index < num_kept // 2, from_front, from_back).astype(np.int64)


def plan_dropout(
  config: DropoutConfig,
  is_visual: Bool[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
  learnt: Bool[np.ndarray, "B T"] | None = None,
  round_length: Callable[[int], int] = lambda length: length,
) -> DropoutPlan:
  """Plans the drops of a batch, on the host.

  Each drop keeps `int(n * ratio)` of a sample's n visual tokens. In training, a drop by attention
  skips samples without an answer to learn: they keep all tokens that they have.

  Two samples in one row, `s v v v v ? | s v v ?`. The first drop keeps half of the visual tokens,
  evenly spaced. The second keeps a quarter, by attention:

      segment_ids          1 1 1 1 1 1 2 2 2 2
      first drop           0 1     4 5 6 7   9       indices [0, 1, 4, 5, 6, 7, 9]

      row after it         s v v ? s v ?
      each sample sorted   s ? v v s ? v             text first, then visual tokens by rank
      second drop          0 1 2   4 5               indices [0, 1, 2, 4, 5]

  Args:
    config: layers, ratios and rules of the drops.
    is_visual: which tokens are visual.
    segment_ids: sample of each token, counted from 1, in rising order; 0 in the padding at the end.
    learnt: in training, which tokens have a label that is learnt (not `IGNORE_LABEL`).
    round_length: maps the longest row after a drop to the length S of all rows, which is at least
      as much. Fewer different lengths mean fewer compilations. By default nothing is rounded.
  """
  batch, width = is_visual.shape
  rows = [
    _samples(is_visual[row], segment_ids[row], None if learnt is None else learnt[row])
    for row in range(batch)
  ]
  drops: dict[int, EvenDrop | RankedDrop] = {}
  for number, (layer, ratio) in enumerate(zip(config.layers, config.ratios[1:], strict=True)):
    ranked = number >= config.num_uniform
    kept, rows = zip(*[_drop_from_row(samples, ratio, ranked) for samples in rows], strict=True)
    length = round_length(max(map(len, kept)))
    indices = [np.pad(row, (0, length - len(row)), constant_values=width) for row in kept]
    drops[layer] = (RankedDrop if ranked else EvenDrop)(np.stack(indices).astype(np.int32))
    width = length
  return DropoutPlan(segment_ids, is_visual, learnt, drops)


class _Sample(NamedTuple):
  """A sample between two drops.

  Attributes:
    is_visual: which of its remaining tokens are visual.
    num_visual: number of its visual tokens before the first drop.
    has_answer: whether attention can rank its visual tokens, see `before_answer`.
  """

  is_visual: np.ndarray
  num_visual: int
  has_answer: bool

  def keep_mask(self, ratio, ranked):
    """Which tokens are kept. With `ranked`, text comes first, then visual tokens by rank."""
    visual = np.flatnonzero(self.is_visual)
    num_kept = int(self.num_visual * ratio)
    if not ranked:
      visual = visual[evenly_spaced(len(visual), num_kept)]
    elif self.has_answer:
      visual = visual[:num_kept]
    keep = ~self.is_visual
    keep[visual] = True
    return keep


def _samples(is_visual, segment_ids, learnt):
  """The samples of one row, before any drop."""
  samples = []
  bounds = np.flatnonzero(np.diff(segment_ids)) + 1
  for tokens in np.split(np.arange(len(segment_ids)), bounds):
    if len(tokens) and segment_ids[tokens[0]] > 0:
      has_answer = learnt is None or (~learnt[tokens[:-1]] & learnt[tokens[1:]]).any()
      samples.append(_Sample(is_visual[tokens], int(is_visual[tokens].sum()), bool(has_answer)))
  return samples


def _drop_from_row(samples, ratio, ranked):
  """The indices of a row's kept tokens (see `EvenDrop`), and its samples after the drop."""
  if ranked:  # text first, then visual tokens by rank
    samples = [sample._replace(is_visual=np.sort(sample.is_visual)) for sample in samples]
  masks = [sample.keep_mask(ratio, ranked) for sample in samples]
  remaining = [
    sample._replace(is_visual=sample.is_visual[keep])
    for sample, keep in zip(samples, masks, strict=True)
  ]
  return np.flatnonzero(np.concatenate([np.zeros(0, bool), *masks])), remaining


def token_indices(plan: DropoutPlan) -> Int[Array, "B T"]:
  """The index of every token in its row, and T in the padding: the kept tokens before any drop."""
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
  """Gathers the tokens that a drop keeps. On a mesh they are split evenly over all devices again.

  Args:
    plan: the plan of the batch.
    drop: one of the plan's drops.
    x: hidden states that enter the first layer after the drop, in the token order of the layout.
    kept: index of each token in its row before any drop. In the padding it is the length of the
      row before any drop.
    queries_and_keys: computes the queries [B, T, N, H] and keys [B, T, K, H] of `x` in that layer.
    layout: how `x` is split over a mesh. All other arrays are in the order of the text.

  Returns:
    `x` and `kept` of the kept tokens. Behind them, `x` is 0, and `kept` is as in the padding above.
  """
  indices = drop.indices
  if isinstance(drop, RankedDrop):
    segment_ids = gather_tokens(plan.segment_ids, kept)
    learnt = None if plan.learnt is None else gather_tokens(plan.learnt, kept)
    scores = visual_scores(*queries_and_keys(x), segment_ids, learnt, layout)
    scores = jnp.where(gather_tokens(plan.is_visual, kept), scores, jnp.inf)
    order = _best_first(scores, _segment_starts(segment_ids))
    indices = jnp.sort(gather_tokens(order, drop.indices, fill=x.shape[1]), axis=1)
  kept = gather_tokens(kept, indices, fill=plan.is_visual.shape[1])
  return sharded_gather(x, indices, layout), kept


def ranked_indices(
  scores: Float[np.ndarray, "T"], is_visual: Bool[np.ndarray, "T"], drop: RankedDrop
) -> Int[np.ndarray, "S"]:
  """As `drop_tokens`, on the host, for one row of one sample: the indices of the tokens to keep.

  Args:
    scores: of each token.
    is_visual: which tokens are visual.
    drop: of this row alone, without padding.
  """
  best_first = np.argsort(np.where(is_visual, -scores, -np.inf), kind="stable")
  return np.sort(best_first[drop.indices[0]])


def visual_scores(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"],
  learnt: Bool[Array, "B T"] | None,
  layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
  """The score of each token: the attention that it gets from the tokens before an answer.

  `before_answer` says which these are. No gradient flows through the scores.

  Args:
    q: queries, in the token order of the layout.
    k: keys, in the token order of the layout.
    segment_ids: sample of each token, in the order of the text, as all arrays below.
    learnt: in training, which tokens have a label that is learnt; None at inference.
    layout: how `q` and `k` are split over a mesh.
  """
  q, k = jax.lax.stop_gradient((q, k))
  is_before_answer = layout.to_zigzag(before_answer(segment_ids, learnt))
  segment_ids = layout.to_zigzag(segment_ids)
  return layout.from_zigzag(received_attention(q, k, is_before_answer, segment_ids, layout))


def before_answer(
  segment_ids: Int[Array, "B T"], learnt: Bool[Array, "B T"] | None
) -> Bool[Array, "B T"]:
  """Which tokens stand right before an answer.

  At inference it is the last token of each segment. In training it is a token that is not learnt,
  if the next token of its segment is: of the tokens `s ? a a ? a`, with `a` learnt, the second and
  the fifth. Where the first token of a row is learnt, the original takes the row's last token, too.
  Here no token is taken for it, since none stands before it.
  """
  last = segment_ids != jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
  if learnt is None:
    return last & (segment_ids > 0)
  return ~learnt & jnp.pad(learnt[:, 1:], ((0, 0), (0, 1))) & ~last


def kept_positions(
  plan: DropoutPlan, kept: Int[Array, "B S"], positions: Int[Array, "B T"] | None
) -> Int[Array, "B S"]:
  """Rotary positions of the tokens that are kept, in the order of the text.

  They are counted anew in each segment. A token whose position is ahead of its place in its
  segment, as in training with jumps, stays as far ahead:

      places in a segment                            0 1 2 3  4  5
      positions, with jumps of 5 and 10              5 6 7 8 19 20
      the same without the third and fourth token    5 6     17 18

  Args:
    plan: says which tokens are a segment.
    kept: index of each token in its row before any drop.
    positions: of all tokens before any drop; None: they are counted from 0 in each segment.
  """
  counted = segment_positions(gather_tokens(plan.segment_ids, kept))
  if positions is None:
    return counted
  ahead = positions - segment_positions(jnp.asarray(plan.segment_ids))
  return counted + gather_tokens(ahead, kept)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Positions counted from 0 in each segment: [1 1 1 2 2 0] gives [0 1 2 0 1 0]."""
  return jnp.arange(segment_ids.shape[1]) - _segment_starts(segment_ids)


def _segment_starts(segment_ids):
  """Index of the first token in each token's segment: [1 1 1 2 2 0] gives [0 0 0 3 3 5]."""
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  first = jnp.where(segment_ids != before, jnp.arange(segment_ids.shape[1]), 0)
  return jax.lax.cummax(first, axis=1)


def _best_first(scores, starts):
  """Indices of the tokens, sorted by falling score in each segment. Ties keep their order."""
  indices = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape)
  return jax.lax.sort((starts, -scores, indices), dimension=1, is_stable=True, num_keys=2)[-1]
