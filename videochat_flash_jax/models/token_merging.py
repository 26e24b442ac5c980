"""Token merging (ToMe, Bolya et al. 2023) as pure functions: the first half of clip-level HiCo.

A round splits the tokens into sources (even positions) and destinations (odd positions). Each
source finds the destination that is most similar to it. The `r` sources with the highest similarity
merge into their destinations. A round is described by one index array: `group[i]` is the index of
the output token that input token i becomes part of.

    6 tokens, r = 2             sources 0 2 4, destinations 1 3 5
    most similar pairs          0->3 (best), 4->1, 2->3 (worst, so 2 is not merged)
    output token 0 1 2 3        made of 2 | 1 and 4 | 3 and 0 | 5
    group                       [2, 1, 0, 2, 1, 3]

The group arrays of several rounds compose into one, and so do averages weighted by size. So all
rounds run on the narrow similarity features, and the wide tokens are averaged only once, in one
matrix product. The result is that of averaging the wide tokens after each round, for a fraction of
the work.
"""

import jax
import jax.numpy as jnp

from videochat_flash_jax.ops.platform import target_platform
from videochat_flash_jax.shapes import Array, Float, Int


def merge_schedule(num_tokens: int, target: int) -> list[int]:
  """How many tokens each round removes: half of them, until `target` remain.

  `merge_schedule(784, 64)` is [392, 196, 98, 34].

  Raises:
    ValueError: `num_tokens` is below `target`.
  """
  if num_tokens < target:
    raise ValueError(
      f"cannot merge {num_tokens} tokens to {target}: give a target of at most {num_tokens}"
    )
  schedule = []
  while num_tokens > target:
    removed = min(num_tokens // 2, num_tokens - target)
    schedule.append(removed)
    num_tokens -= removed
  return schedule


def similarity_features(x: Float[Array, "C P E"], num_heads: int) -> Float[Array, "C P H"]:
  """The features by which tokens are compared: those of `x` averaged over heads, in float32."""
  heads = x.astype(jnp.float32).reshape(*x.shape[:-1], num_heads, -1)
  return heads.mean(axis=-2)


def match_tokens(features: Float[Array, "C P H"], num_removed: int) -> Int[Array, "C P"]:
  """One round: the index of the output token that each token becomes part of.

  The output has first the sources that are not merged, by falling similarity, and then all
  destinations in their order. Sources with equal similarity keep their order.

  Args:
    features: what tokens are compared by, with cosine similarity.
    num_removed: r, at most the number of destinations.
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True))
  features = features / jnp.maximum(norm, 1e-30)  # a zero vector is similar to nothing
  sources, destinations = features[:, ::2], features[:, 1::2]
  scores = jnp.einsum("cah,cbh->cab", sources, destinations, precision=jax.lax.Precision.HIGHEST)
  best = scores.max(axis=-1)
  # The first best destination. This is argmax, which XLA on the CPU runs on one core, unvectorised.
  index = jnp.arange(destinations.shape[1])
  partner = jnp.where(scores == best[..., None], index, index.size).min(axis=-1)
  num_unmerged = sources.shape[1] - num_removed
  source_group = num_unmerged + partner
  if num_unmerged:
    best_first = jnp.argsort(-best, axis=-1, stable=True)
    rank = jnp.argsort(best_first, axis=-1)
    source_group = jnp.where(rank < num_removed, source_group, rank - num_removed)
  destination_group = num_unmerged + index
  group = jnp.zeros(features.shape[:2], jnp.int32)
  group = group.at[:, ::2].set(source_group.astype(jnp.int32))
  return group.at[:, 1::2].set(destination_group.astype(jnp.int32))


def sum_groups(
  x: Float[Array, "C P E"], group: Int[Array, "C P"], num_groups: int
) -> Float[Array, "C V E"]:
  """Sums the tokens of each group, as a matrix product, since scatters are slow.

  But on a CPU, a scatter of the narrow features of 16 clips of 784 tokens takes 1.5 ms of a core,
  and the product 11 ms. For tokens of 1,024 channels both take the same, and only the product runs
  on all cores.
  """
  if target_platform() == "cpu" and x.shape[-1] < num_groups:
    sums = jnp.zeros((len(x), num_groups, x.shape[-1]))
    return jax.vmap(lambda sums, group, x: sums.at[group].add(x))(sums, group, x)
  return jnp.einsum(
    "cvp,cpe->cve",
    _members(group, num_groups).astype(x.dtype),
    x,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def merge_tokens(x: Float[Array, "C P E"], *, target: int, num_heads: int) -> Float[Array, "C V E"]:
  """Merges the P tokens of each clip to V = `target`.

  Gradients flow through the averages, not through the choice of partners.

  Args:
    x: tokens of each clip, in the order frame, row, column.
    target: V, at most P. With V = P nothing is merged.
    num_heads: heads over which features are averaged for comparison.
  """
  features = jax.lax.stop_gradient(similarity_features(x, num_heads))
  group = merge_groups(features, target=target)
  size = jnp.sum(_members(group, target), axis=-1, keepdims=True)
  return (sum_groups(x, group, target) / size).astype(x.dtype)


def merge_groups(features: Float[Array, "C P H"], *, target: int) -> Int[Array, "C P"]:
  """All rounds: the index of the output token that each token becomes part of.

  A CPU takes one clip after another: it finds the scores of one clip in its cache, and does not ask
  the operating system for memory each time. 16 clips of 784 tokens then take 8 instead of 19 ms.
  """
  if target_platform() == "cpu" and len(features) > 1:
    return jax.lax.map(lambda clip: merge_groups(clip[None], target=target)[0], features)
  num_tokens = features.shape[1]
  group = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), features.shape[:2])
  for num_removed in merge_schedule(num_tokens, target):
    step = match_tokens(features, num_removed)
    # Sums instead of averages, since cosine similarity does not depend on the length.
    features = sum_groups(features, step, step.shape[1] - num_removed)
    group = jnp.take_along_axis(step, group, axis=1)
  return group


def _members(group, num_groups):
  """Whether token p belongs to group v: [C, V, P]."""
  return group[:, None, :] == jnp.arange(num_groups)[None, :, None]
