"""Computes the signed distance to the silhouettes of the synthetic world's things.

Distances are computed once on a grid, and then looked up with linear interpolation. So a star costs
no more time than a ball.
"""

import functools

import numpy as np

KINDS = (
  "ball", "ring", "square", "triangle", "star", "heart", "cross", "moon",
  "arrow", "hourglass", "bolt", "fish", "mushroom", "flower", "bone", "key",
)  # fmt: skip

_REACH = 1.6  # The grid spans -_REACH to _REACH; a silhouette fills about -1 to 1.
_CELLS = 256


def signed_distance(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the signed distance of points to the silhouette of KINDS[kind], negative inside it.

  Args:
    kind: index of KINDS.
    x: coordinates to the right, of any shape. A silhouette fills about -1 to 1.
    y: coordinates downwards, of the same shape.

  Returns:
    Distances of that shape, in the same unit.
  """
  table = _distance_table(KINDS[kind]).reshape(-1)
  scale = np.float32(_CELLS / (2 * _REACH))
  column = np.clip((x + _REACH) * scale, 0, _CELLS - 1.001)
  row = np.clip((y + _REACH) * scale, 0, _CELLS - 1.001)
  left, top = column.astype(np.int32), row.astype(np.int32)
  column -= left
  row -= top
  corner = top * (_CELLS + 1) + left
  upper = table[corner] + column * (table[corner + 1] - table[corner])
  corner += _CELLS + 1
  lower = table[corner] + column * (table[corner + 1] - table[corner])
  return upper + row * (lower - upper)


@functools.cache
def _distance_table(kind: str) -> np.ndarray:
  """Distances to the silhouette on a grid: float32 `[_CELLS + 1, _CELLS + 1]`, y first."""
  line = np.linspace(-_REACH, _REACH, _CELLS + 1)
  x, y = np.meshgrid(line, line)
  return _SILHOUETTES[kind](x, y).astype(np.float32)


def _disc(x, y, cx=0.0, cy=0.0, radius=1.0):
  return np.hypot(x - cx, y - cy) - radius


def _box(x, y, cx, cy, half_width, half_height):
  away_x, away_y = np.abs(x - cx) - half_width, np.abs(y - cy) - half_height
  outside = np.hypot(np.maximum(away_x, 0), np.maximum(away_y, 0))
  return outside + np.minimum(np.maximum(away_x, away_y), 0)


def _polygon(x, y, corners):
  """Signed distance to a simple polygon: to the nearest edge; the sign by the even-odd rule."""
  corners = np.asarray(corners, float)
  nearest = np.full(x.shape, np.inf)
  inside = np.zeros(x.shape, bool)
  for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
    ex, ey = bx - ax, by - ay
    along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
    nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
    if ay != by:
      crosses = (ay > y) != (by > y)
      inside ^= crosses & (x < ex * (y - ay) / ey + ax)
  return np.where(inside, -nearest, nearest)


def _star_corners(points, inner):
  turns = np.arange(2 * points) * np.pi / points
  radius = np.where(np.arange(2 * points) % 2, inner, 1.05)
  return np.stack([radius * np.sin(turns), -radius * np.cos(turns)], axis=1)


def _petals(x, y):
  turns = np.arange(5) * 2 * np.pi / 5
  petals = [_disc(x, y, 0.62 * np.sin(a), -0.62 * np.cos(a), 0.38) for a in turns]
  return np.maximum(np.minimum.reduce(petals), -_disc(x, y, 0, 0, 0.26))


_SILHOUETTES = {
  "ball": lambda x, y: _disc(x, y, radius=0.9),
  "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.73) - 0.24,
  "square": lambda x, y: _box(x, y, 0, 0, 0.8, 0.8),
  "triangle": lambda x, y: _polygon(x, y, [(0, -0.95), (1.0, 0.8), (-1.0, 0.8)]),
  "star": lambda x, y: _polygon(x, y, _star_corners(5, 0.42)),
  "heart": lambda x, y: np.minimum(
    np.minimum(_disc(x, y, -0.46, -0.36, 0.5), _disc(x, y, 0.46, -0.36, 0.5)),
    _polygon(x, y, [(-0.9, -0.12), (0, -0.5), (0.9, -0.12), (0, 1.0)]),
  ),
  "cross": lambda x, y: np.minimum(_box(x, y, 0, 0, 1.0, 0.3), _box(x, y, 0, 0, 0.3, 1.0)),
  "moon": lambda x, y: np.maximum(_disc(x, y, 0, 0, 1.0), -_disc(x, y, 0.55, 0, 0.8)),
  "arrow": lambda x, y: np.minimum(
    _box(x, y, -0.45, 0, 0.55, 0.25), _polygon(x, y, [(0.0, -0.85), (1.05, 0), (0.0, 0.85)])
  ),
  "hourglass": lambda x, y: np.minimum(
    _polygon(x, y, [(-0.85, -1.0), (0.85, -1.0), (0, 0.15)]),
    _polygon(x, y, [(-0.85, 1.0), (0.85, 1.0), (0, -0.15)]),
  ),
  "bolt": lambda x, y: _polygon(
    x, y, [(0.45, -1.1), (-0.65, 0.2), (-0.1, 0.2), (-0.45, 1.1), (0.65, -0.25), (0.1, -0.25)]
  ),
  "fish": lambda x, y: np.minimum(
    (np.hypot((x + 0.25) / 0.75, y / 0.5) - 1.0) * 0.5,
    _polygon(x, y, [(0.25, 0), (1.0, -0.65), (1.0, 0.65)]),
  ),
  "mushroom": lambda x, y: np.minimum(
    np.maximum(_disc(x, y, 0, 0, 1.0), y), _box(x, y, 0, 0.45, 0.26, 0.5)
  ),
  "flower": _petals,
  "bone": lambda x, y: np.minimum(
    _box(x, y, 0, 0, 0.7, 0.17),
    np.minimum.reduce([_disc(x, y, cx, cy, 0.3) for cx in (-0.75, 0.75) for cy in (-0.28, 0.28)]),
  ),
  "key": lambda x, y: np.minimum.reduce(
    [
      np.abs(_disc(x, y, 0, -0.55, 0.36)) - 0.16,
      _box(x, y, 0, 0.4, 0.14, 0.65),
      _box(x, y, 0.3, 0.9, 0.3, 0.13),
      _box(x, y, 0.25, 0.48, 0.25, 0.13),
    ]
  ),
}
