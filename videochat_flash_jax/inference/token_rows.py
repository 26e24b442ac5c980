"""`TokenRows`: vectors of tokens on the host, to which more are added as they are computed."""

import numpy as np

from videochat_flash_jax.shapes import Float, Int


class TokenRows:
  """Vectors [T, D] in host memory that grow at the end.

  Attributes:
    num_rows: T.
  """

  def __init__(self):
    self.num_rows = 0
    self._rows: np.ndarray | None = None  # with room for more rows than there are

  def __len__(self) -> int:
    return self.num_rows

  @property
  def room(self) -> int:
    """For how many vectors there is memory."""
    return 0 if self._rows is None else len(self._rows)

  def append(self, rows: Float[np.ndarray, "T D"]) -> None:
    """Adds vectors at the end."""
    end = self.num_rows + len(rows)
    if end > self.room:  # pages of memory that are never written take no room
      larger = np.empty((max(end, 2 * self.room), rows.shape[1]), rows.dtype)
      if self.num_rows:
        larger[: self.num_rows] = self._rows[: self.num_rows]
      self._rows = larger
    self._rows[self.num_rows : end] = rows
    self.num_rows = end

  def take(self, index: Int[np.ndarray, "T"] | slice) -> Float[np.ndarray, "T D"]:
    """Returns the vectors at some indices, of which there must be some."""
    return self._rows[: self.num_rows][index]

  def forget(self, start: int, num_rows: int) -> None:
    """Removes some vectors; those behind them move up."""
    end = min(start + num_rows, self.num_rows)
    if end > start:
      kept = self._rows[end : self.num_rows].copy()
      self._rows[start : start + len(kept)] = kept
      self.num_rows = start + len(kept)

  def truncate(self, num_rows: int) -> None:
    """Keeps the first vectors only."""
    self.num_rows = min(self.num_rows, num_rows)
