"""Token merging (ToMe, Bolya et al. 2023) as pure functions: clip-level HiCo's first half.

In each round the tokens at even places (sources) look for the most similar token at odd places
(destinations), and the most similar `r` sources merge into theirs. A round is described by one
index array: `group[i]` is the place of the output token that input token i ends in.

    6 tokens, r = 2:  sources 0 2 4, destinations 1 3 5
    most similar pairs 0->3 (best), 4->1, 2->3 (worst, stays)
    output places: [2, 3, 1, 5] and so group = [2, 1, 0, 2, 1, 3]
    (token 2 stays and comes first; then the destinations 1, 3, 5 at places 1, 2, 3)

Groups compose, and so do averages weighted by size. All rounds therefore run on the narrow
similarity features alone, and the wide tokens are averaged once, in one matrix product: the
result is that of averaging after each round, for a fraction of the work.
"""

import jax
import jax.numpy as jnp

from videochat_flash_jax.shapes import Array, Float, Int


def merge_schedule(num_tokens: int, target: int) -> list[int]:
  """How many tokens each round removes: half of them, until `target` are left.

  `merge_schedule(784, 64)` is [392, 196, 98, 34].

  Raises:
    ValueError: `num_tokens` is below `target`.
  """
  if num_tokens < target:
    raise ValueError(f"cannot merge {num_tokens} tokens to {target}: there are fewer already")
  schedule = []
  while num_tokens > target:
    removed = min(num_tokens // 2, num_tokens - target)
    schedule.append(removed)
    num_tokens -= removed
  return schedule


def similarity_features(x: Float[Array, "C P E"], num_heads: int) -> Float[Array, "C P H"]:
  """What tokens are compared by: their features averaged over heads, in float32."""
  heads = x.astype(jnp.float32).reshape(*x.shape[:-1], num_heads, -1)
  return heads.mean(axis=-2)


def match_tokens(features: Float[Array, "C P H"], num_removed: int) -> Int[Array, "C P"]:
  """One round: the place of the output token that each token ends in.

  Output places: first the sources that stay, in the order of falling similarity, then all
  destinations in their own order. Equal similarities keep the order of their places.

  Args:
    features: what tokens are compared by (cosine similarity).
    num_removed: r, at most the number of destinations.
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True))
  features = features / jnp.maximum(norm, 1e-30)  # a zero vector is similar to nothing
  sources, destinations = features[:, ::2], features[:, 1::2]
  scores = jnp.einsum("cah,cbh->cab", sources, destinations, precision=jax.lax.Precision.HIGHEST)
  best = scores.max(axis=-1)
  # The first best destination: argmax, which XLA on the CPU runs on one core, without vectors.
  places = jnp.arange(destinations.shape[1])
  partner = jnp.where(scores == best[..., None], places, places.size).min(axis=-1)
  num_staying = sources.shape[1] - num_removed
  source_place = num_staying + partner
  if num_staying:
    best_first = jnp.argsort(-best, axis=-1, stable=True)
    rank = jnp.argsort(best_first, axis=-1)
    source_place = jnp.where(rank < num_removed, source_place, rank - num_removed)
  destination_place = num_staying + places
  group = jnp.zeros(features.shape[:2], jnp.int32)
  group = group.at[:, ::2].set(source_place.astype(jnp.int32))
  return group.at[:, 1::2].set(destination_place.astype(jnp.int32))


def sum_groups(
  x: Float[Array, "C P E"], group: Int[Array, "C P"], num_groups: int
) -> Float[Array, "C V E"]:
  """Sums the tokens of each group, as a matrix product: scatters are slow on TPU and CPU."""
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
    x: tokens of each clip, in raster order.
    target: V, below P or equal (then the tokens are returned as they are).
    num_heads: heads over which features are averaged for comparison.
  """
  features = jax.lax.stop_gradient(similarity_features(x, num_heads))
  group = merge_groups(features, target=target)
  size = jnp.sum(_members(group, target), axis=-1, keepdims=True)
  return (sum_groups(x, group, target) / size).astype(x.dtype)


def merge_groups(features: Float[Array, "C P H"], *, target: int) -> Int[Array, "C P"]:
  """All rounds: the output token that each token ends in."""
  num_tokens = features.shape[1]
  group = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), features.shape[:2])
  for num_removed in merge_schedule(num_tokens, target):
    step = match_tokens(features, num_removed)
    # Sums, not averages: the cosine sees no difference.
    features = sum_groups(features, step, step.shape[1] - num_removed)
    group = jnp.take_along_axis(step, group, axis=1)
  return group


def _members(group, num_groups):
  """Whether token p is of group v: [C, V, P]."""
  return group[:, None, :] == jnp.arange(num_groups)[None, :, None]
