"""Renders frames of the synthetic world: things, motion and textures as functions of time.

Every colour is a formula of the coordinates in the picture (x to the right, y downwards, both from
0 to 1) and of the time in seconds. So a scene can be rendered at any size and at any time. Edges
are smoothed over one pixel by their signed distance (negative inside a silhouette); downscaling a
larger picture would give the same result.
"""

from dataclasses import dataclass

import numpy as np

from videochat_flash_jax.synthetic.shapes import signed_distance

# A thing needs this long to appear and to disappear. It is less than half a second, so that in the
# middle of every second the whole thing is visible.
ENTRANCE_SECONDS = 0.3
OUTLINE = 0.018  # Width of the outline around a thing, as a fraction of the picture's side.
_MAX_RADII = 1.5  # No point of a thing is farther from its centre than this many radii.

COLOURS = {
  "red": (222, 34, 38),
  "orange": (255, 136, 10),
  "yellow": (250, 226, 40),
  "green": (36, 160, 50),
  "cyan": (40, 212, 222),
  "blue": (36, 70, 214),
  "purple": (132, 36, 176),
  "pink": (255, 130, 190),
}


@dataclass(frozen=True)
class Path:
  """A motion: back and forth between the sides of a box, plus a small sine; arrays `[2]` (x, y).

  Attributes:
    low, high: two corners of the box.
    speed: crossings of the box per second (with a sharp turn at its sides, like a bouncing ball).
    phase: starting point, in crossings.
    wiggle: amplitude and rate (per second) of the added sine.
  """

  low: np.ndarray
  high: np.ndarray
  speed: np.ndarray
  phase: np.ndarray
  wiggle: tuple[float, float]

  def __call__(self, seconds: np.ndarray) -> np.ndarray:
    """Returns coordinates `[F, 2]` at the times `seconds [F]`."""
    crossings = self.phase + self.speed * seconds[:, None]
    bounce = np.abs(crossings % 2.0 - 1.0)
    amplitude, rate = self.wiggle
    sine = amplitude * np.sin(2 * np.pi * (rate * seconds[:, None] + self.phase[::-1]))
    return self.low + (self.high - self.low) * bounce + sine


@dataclass(frozen=True)
class Texture:
  """A moving background: up to four plane waves, sharpened and mapped to two colours.

  Attributes:
    waves: `[4, 2]`, cycles across the picture in x and y.
    drift: `[4]`, cycles per second.
    phase: `[4]`, in cycles.
    weight: `[4]`; zero switches a wave off (one wave: stripes; two: plaid; three: honeycomb).
    sharpness: sharpness of the edges.
    colours: `[2, 3]`, RGB from 0 to 255.
  """

  waves: np.ndarray
  drift: np.ndarray
  phase: np.ndarray
  weight: np.ndarray
  sharpness: float
  colours: np.ndarray


@dataclass(frozen=True)
class Clutter:
  """A grey or brown thing that no question is about: a rounded bar, box or disc.

  It moves along `path` and turns. `half_size [2]` (without the rounding) and `rounding` are
  fractions of the picture's side. `turn` is the angle in radians at second 0, and its change per
  second.
  """

  path: Path
  half_size: np.ndarray
  rounding: float
  turn: tuple[float, float]
  colour: np.ndarray


@dataclass(frozen=True)
class Event:
  """A thing that appears, moves and disappears.

  `kind` and `colour` are indices of KINDS and COLOURS. The thing is visible from second `start` to
  second `start + length`. `slide [2]` is the direction from which it slides in; if it is zero, the
  thing grows instead. `tilt` is the angle in radians around which it swings, the amplitude of the
  swing, and its rate per second. `fill [3]` and `outline [3]` are RGB colours from 0 to 255.
  """

  kind: int
  colour: int
  start: int
  length: int
  path: Path
  radius: float
  slide: np.ndarray
  tilt: tuple[float, float, float]
  fill: np.ndarray
  outline: np.ndarray


@dataclass(frozen=True)
class Scene:
  """The content of a video of `num_seconds`; events are in order of time and do not overlap."""

  num_seconds: int
  texture: Texture
  clutter: tuple[Clutter, ...]
  events: tuple[Event, ...]

  def event_at(self, second: int) -> int:
    """Returns the index of the event that is visible in that second, or -1."""
    for index, event in enumerate(self.events):
      if event.start <= second < event.start + event.length:
        return index
    return -1


def render(scene: Scene, seconds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Renders frames of a scene.

  Args:
    scene: the scene.
    seconds: `[F]`, times of the frames, rising.
    size: side of a frame in pixels.

  Returns:
    Frames, uint8 `[F, size, size, 3]`, and the fraction of each pixel that the visible thing
    covers, float32 `[F, size, size]` (zeros where no thing is visible).
  """
  seconds = np.asarray(seconds, np.float32)
  frames = _draw_texture(scene.texture, seconds, size)
  for clutter in scene.clutter:
    _draw_clutter(frames, clutter, seconds)
  cover = np.zeros(frames.shape[:3], np.float32)
  for event in scene.events:
    visible = np.flatnonzero((seconds >= event.start) & (seconds < event.start + event.length))
    if visible.size:
      first, last = visible[0], visible[-1] + 1  # Times rise, so a slice (a view) is enough.
      cover[first:last] = _draw_event(frames[first:last], event, seconds[first:last])
  return np.clip(frames + 0.5, 0, 255).astype(np.uint8), cover


def _draw_texture(texture: Texture, seconds: np.ndarray, size: int) -> np.ndarray:
  """Renders the background: float32 `[F, size, size, 3]`."""
  coordinate = ((np.arange(size) + 0.5) / size).astype(np.float32)
  value = np.zeros((len(seconds), size, size), np.float32)
  for wave, drift, phase, weight in zip(
    texture.waves, texture.drift, texture.phase, texture.weight, strict=True
  ):
    if weight == 0.0:
      continue
    # cos(a + b) = cos a cos b - sin a sin b, so sines are computed per row and per column, not per
    # pixel.
    across = 2 * np.pi * (wave[0] * coordinate[None] + (drift * seconds + phase)[:, None])
    down = 2 * np.pi * wave[1] * coordinate
    value += weight * (
      np.cos(across)[:, None, :] * np.cos(down)[None, :, None]
      - np.sin(across)[:, None, :] * np.sin(down)[None, :, None]
    )
  mix = 0.5 + 0.5 * np.tanh(texture.sharpness * value)
  dark, light = texture.colours.astype(np.float32)
  return dark + mix[..., None] * (light - dark)


def _window(centre, reach, size):
  """The part of the picture that contains a thing in all frames: a slice of rows, one of columns.

  `centre [F, 2]` is the centre of the thing, and `reach` the largest distance of a point of the
  thing, with its smoothed edge, from that centre.
  """
  low = np.floor((centre.min(axis=0) - reach) * size).astype(int)
  high = np.ceil((centre.max(axis=0) + reach) * size).astype(int)
  left, top = np.clip(low, 0, size)
  right, bottom = np.clip(high, 0, size)
  return slice(top, bottom), slice(left, right)


def _local(window, size, centre, angle):
  """Coordinates x and y, each `[F, h, w]`, of a window's pixels in the system of a thing.

  The origin is `centre [F, 2]`, and the axes are turned by `angle [F]`.
  """
  coordinate = ((np.arange(size) + 0.5) / size).astype(np.float32)
  rows, columns = window
  x = coordinate[None, None, columns] - centre[:, 0, None, None]
  y = coordinate[None, rows, None] - centre[:, 1, None, None]
  cosine = np.cos(angle)[:, None, None]
  sine = np.sin(angle)[:, None, None]
  return cosine * x + sine * y, cosine * y - sine * x


def _paint(frames, cover, colour):
  """Blends `colour` into `frames [F, h, w, 3]`, with the opacity `cover [F, h, w]`."""
  frames += cover[..., None] * (colour.astype(np.float32) - frames)


def _draw_clutter(frames: np.ndarray, clutter: Clutter, seconds: np.ndarray):
  size = frames.shape[1]
  angle = (clutter.turn[0] + clutter.turn[1] * seconds).astype(np.float32)
  centre = clutter.path(seconds).astype(np.float32)
  reach = np.hypot(*clutter.half_size) + clutter.rounding + 1 / size
  window = _window(centre, reach, size)
  x, y = _local(window, size, centre, angle)
  away_x = np.abs(x) - np.float32(clutter.half_size[0])
  away_y = np.abs(y) - np.float32(clutter.half_size[1])
  outside = np.hypot(np.maximum(away_x, 0), np.maximum(away_y, 0))
  distance = outside + np.minimum(np.maximum(away_x, away_y), 0) - clutter.rounding
  _paint(frames[:, *window], np.clip(0.5 - distance * size, 0, 1), clutter.colour)


def _draw_event(frames: np.ndarray, event: Event, seconds: np.ndarray) -> np.ndarray:
  """Draws the thing into `frames`; returns the fraction of each pixel it covers, `[F, S, S]`."""
  size = frames.shape[1]
  covers = np.zeros(frames.shape[:3], np.float32)
  to_end = np.minimum(seconds - event.start, event.start + event.length - seconds)
  # From 0 to 1 while the thing appears, from 1 to 0 while it disappears, without sudden changes.
  entered = np.clip(to_end / ENTRANCE_SECONDS, 0, 1)
  entered = (entered * entered * (3 - 2 * entered)).astype(np.float32)
  slides = bool(event.slide.any())
  centre = event.path(seconds) + ((1 - entered)[:, None] * event.slide if slides else 0.0)
  centre = centre.astype(np.float32)
  if slides:
    radius = np.full_like(entered, event.radius)
  else:
    radius = np.maximum(event.radius * entered, 1e-3)
  base, swing, rate = event.tilt
  angle = (base + swing * np.sin(2 * np.pi * rate * seconds)).astype(np.float32)
  window = _window(centre, _MAX_RADII * event.radius + OUTLINE + 1 / size, size)
  x, y = _local(window, size, centre, angle)
  frames, radius = frames[:, *window], radius[:, None, None]
  distance = signed_distance(event.kind, x / radius, y / radius) * radius
  # Far from a thing that is still tiny, its own distance is lost in rounding, and its outline would
  # cross the whole picture. This lower bound of the distance prevents it.
  distance = np.maximum(distance, np.hypot(x, y) - _MAX_RADII * radius)
  cover = np.clip(0.5 - (distance - OUTLINE) * size, 0, 1)
  _paint(frames, cover, event.outline)
  shade = 1.0 - 0.15 * y / radius  # A little lighter at the top.
  inside = np.clip(0.5 - distance * size, 0, 1)[..., None]
  frames += inside * (event.fill.astype(np.float32) * shade[..., None] - frames)
  covers[:, *window] = cover
  return covers
