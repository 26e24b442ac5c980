"""Pictures of the synthetic world: things, motion and textures as functions of time.

Everything is a formula of the place in the picture (x to the right, y downwards, both 0 to 1) and
of the time in seconds, so a scene can be drawn at any size and at any moment. Edges are smoothed
over one pixel by their signed distance (negative inside a silhouette), which is what shrinking a
larger picture would give.
"""

from dataclasses import dataclass

import numpy as np

from videochat_flash_jax.synthetic.shapes import signed_distance

ENTRANCE_SECONDS = 0.3  # A thing needs this long to come in and to go: shorter than half a second,
# so that in the middle of every second it is wholly there.
OUTLINE = 0.018  # Width of the outline around a thing, as a part of the picture's side.
_FARTHEST = 1.5  # All things lie within so many radii.

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
  """A motion: to and fro between two corners of a box, with a wiggle on top; arrays `[2]` (x, y).

  Attributes:
    low, high: the box.
    speed: crossings of the box a second (a sharp turn at its sides, as a ball bounces).
    phase: where it starts, in crossings.
    wiggle: amplitude and rate (a second) of the sine on top.
  """

  low: np.ndarray
  high: np.ndarray
  speed: np.ndarray
  phase: np.ndarray
  wiggle: tuple[float, float]

  def __call__(self, seconds: np.ndarray) -> np.ndarray:
    """Returns places `[F, 2]` at `seconds [F]`."""
    crossings = self.phase + self.speed * seconds[:, None]
    bounce = np.abs(crossings % 2.0 - 1.0)
    amplitude, rate = self.wiggle
    sine = amplitude * np.sin(2 * np.pi * (rate * seconds[:, None] + self.phase[::-1]))
    return self.low + (self.high - self.low) * bounce + sine


@dataclass(frozen=True)
class Texture:
  """A drifting background: up to four plane waves, sharpened and mapped onto two colours.

  Attributes:
    waves: `[4, 2]` cycles across the picture in x and y.
    drift: `[4]` cycles a second.
    phase: `[4]` cycles.
    weight: `[4]`; zero switches a wave off (one wave: stripes; two: plaid; three: honeycomb).
    sharpness: how hard the edges are.
    colours: `[2, 3]` RGB, 0 to 255.
  """

  waves: np.ndarray
  drift: np.ndarray
  phase: np.ndarray
  weight: np.ndarray
  sharpness: float
  colours: np.ndarray


@dataclass(frozen=True)
class Clutter:
  """A neutral thing that nobody asks about: a rounded bar, box or disc that moves and turns.

  `half_size [2]` without the rounding and `rounding` are parts of the picture's side; `turn` is
  the angle in radians at second 0 and its change a second.
  """

  path: Path
  half_size: np.ndarray
  rounding: float
  turn: tuple[float, float]
  colour: np.ndarray


@dataclass(frozen=True)
class Event:
  """A thing that comes, moves and goes: `kind` and `colour` are indices of KINDS and COLOURS.

  It is there from second `start` to second `start + length`. `slide [2]` is the direction from
  which it slides in; a zero vector means that it grows instead. `tilt` is the angle in radians at
  second 0, the amplitude of its rocking and the rate of it a second.
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
  """A video before it is drawn: `num_seconds` long, events in their order, none overlapping."""

  num_seconds: int
  texture: Texture
  clutter: tuple[Clutter, ...]
  events: tuple[Event, ...]

  def event_at(self, second: int) -> int:
    """Returns the index of the event seen in that second, or -1."""
    for index, event in enumerate(self.events):
      if event.start <= second < event.start + event.length:
        return index
    return -1


def render(scene: Scene, seconds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws a scene.

  Args:
    scene: what to draw.
    seconds: `[F]` moments.
    size: side of the picture in pixels.

  Returns:
    Frames, uint8 `[F, size, size, 3]`, and how much of each pixel the event's thing covers,
    float32 `[F, size, size]` (zeros where no event is).
  """
  seconds = np.asarray(seconds, np.float32)
  frames = _draw_texture(scene.texture, seconds, size)
  for clutter in scene.clutter:
    _draw_clutter(frames, clutter, seconds)
  cover = np.zeros(frames.shape[:3], np.float32)
  for event in scene.events:
    seen = np.flatnonzero((seconds >= event.start) & (seconds < event.start + event.length))
    if seen.size:
      first, last = seen[0], seen[-1] + 1  # Moments rise, so a slice (a view) will do.
      cover[first:last] = _draw_event(frames[first:last], event, seconds[first:last])
  return np.clip(frames + 0.5, 0, 255).astype(np.uint8), cover


def _draw_texture(texture: Texture, seconds: np.ndarray, size: int) -> np.ndarray:
  """Returns float32 `[F, size, size, 3]`."""
  place = ((np.arange(size) + 0.5) / size).astype(np.float32)
  value = np.zeros((len(seconds), size, size), np.float32)
  for wave, drift, phase, weight in zip(
    texture.waves, texture.drift, texture.phase, texture.weight, strict=True
  ):
    if weight == 0.0:
      continue
    # cos(a + b) = cos a cos b - sin a sin b: sines of rows and columns only, not of every pixel.
    across = 2 * np.pi * (wave[0] * place[None] + (drift * seconds + phase)[:, None])
    down = 2 * np.pi * wave[1] * place
    value += weight * (
      np.cos(across)[:, None, :] * np.cos(down)[None, :, None]
      - np.sin(across)[:, None, :] * np.sin(down)[None, :, None]
    )
  mix = 0.5 + 0.5 * np.tanh(texture.sharpness * value)
  dark, light = texture.colours.astype(np.float32)
  return dark + mix[..., None] * (light - dark)


def _window(centre, reach, size):
  """The part of a picture out of which a thing never sticks: slices of rows and of columns.

  `centre [F, 2]` is where it is, and `reach` how far it and its smoothed edge come.
  """
  low = np.floor((centre.min(axis=0) - reach) * size).astype(int)
  high = np.ceil((centre.max(axis=0) + reach) * size).astype(int)
  left, top = np.clip(low, 0, size)
  right, bottom = np.clip(high, 0, size)
  return slice(top, bottom), slice(left, right)


def _local(window, size, centre, angle):
  """Returns places of a window's pixels relative to `centre [F, 2]`, turned by `angle [F]`.

  They are x and y, `[F, h, w]`.
  """
  place = ((np.arange(size) + 0.5) / size).astype(np.float32)
  rows, columns = window
  x = place[None, None, columns] - centre[:, 0, None, None]
  y = place[None, rows, None] - centre[:, 1, None, None]
  cosine = np.cos(angle)[:, None, None]
  sine = np.sin(angle)[:, None, None]
  return cosine * x + sine * y, cosine * y - sine * x


def _paint(frames, cover, colour):
  """Lays `colour` over `frames [F, h, w, 3]` in place where `cover [F, h, w]` is one."""
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
  """Draws the thing in place and returns how much of each pixel it covers `[F, S, S]`."""
  size = frames.shape[1]
  covers = np.zeros(frames.shape[:3], np.float32)
  since = np.minimum(seconds - event.start, event.start + event.length - seconds)
  there = np.clip(since / ENTRANCE_SECONDS, 0, 1)
  there = (there * there * (3 - 2 * there)).astype(np.float32)
  slides = bool(event.slide.any())
  centre = event.path(seconds) + ((1 - there)[:, None] * event.slide if slides else 0.0)
  centre = centre.astype(np.float32)
  radius = np.full_like(there, event.radius) if slides else np.maximum(event.radius * there, 1e-3)
  base, rocking, rate = event.tilt
  angle = (base + rocking * np.sin(2 * np.pi * rate * seconds)).astype(np.float32)
  window = _window(centre, _FARTHEST * event.radius + OUTLINE + 1 / size, size)
  x, y = _local(window, size, centre, angle)
  frames, radius = frames[:, *window], radius[:, None, None]
  distance = signed_distance(event.kind, x / radius, y / radius) * radius
  # Further off, while one is still tiny, its own distance is rounded away, and its outline would
  # cross the whole picture.
  distance = np.maximum(distance, np.hypot(x, y) - _FARTHEST * radius)
  cover = np.clip(0.5 - (distance - OUTLINE) * size, 0, 1)
  _paint(frames, cover, event.outline)
  shade = 1.0 - 0.15 * y / radius  # A little lighter at the top.
  inside = np.clip(0.5 - distance * size, 0, 1)[..., None]
  frames += inside * (event.fill.astype(np.float32) * shade[..., None] - frames)
  covers[:, *window] = cover
  return covers
