"""The peer of our token merging: ToMe as it was published, in torch; needs the extra `bench`.

Each round averages the wide tokens, weighted by size, as Bolya et al. (2023) and VideoChat-Flash
do. `models/token_merging.py` says what we do instead.
"""

import numpy as np

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.models.token_merging import merge_schedule


class ToMePeer:
  """Merges tokens [clips, tokens, width] to `target` tokens of each clip."""

  def __init__(self, x: np.ndarray, target: int, num_heads: int):
    import torch

    torch.set_num_threads(usable_cores())
    self.name = f"ToMe in torch {torch.__version__}"
    self._torch, self._x, self._num_heads = torch, torch.from_numpy(x), num_heads
    self._schedule = merge_schedule(x.shape[1], target)

  def merge(self):
    """Runs all rounds."""
    with self._torch.inference_mode():
      x, size = self._x, self._torch.ones_like(self._x[..., :1])
      for num_removed in self._schedule:
        x, size = self._round(x, size, num_removed)
      return x

  def _round(self, x, size, num_removed):
    """Merges the `num_removed` sources that are most similar to a destination."""
    torch = self._torch
    features = x.unflatten(-1, (self._num_heads, -1)).mean(-2)
    features = features / features.norm(dim=-1, keepdim=True)
    similarity, partner = (features[:, ::2] @ features[:, 1::2].mT).max(-1)
    best_first = similarity.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = best_first[:, :num_removed], best_first[:, num_removed:]
    partner = partner.gather(1, merged)

    def summed(values):
      """The unmerged sources, and the destinations with the sources that merge into them."""
      sources, destinations = values[:, ::2], values[:, 1::2]
      along = lambda index: index[..., None].expand(-1, -1, values.shape[-1])  # noqa: E731
      added = sources.gather(1, along(merged))
      destinations = destinations.scatter_reduce(1, along(partner), added, "sum")
      return torch.cat([sources.gather(1, along(unmerged)), destinations], 1)

    new_size = summed(size)
    return summed(x * size) / new_size, new_size
