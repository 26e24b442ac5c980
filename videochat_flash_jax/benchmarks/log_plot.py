"""Draws lines in an SVG picture, with logarithmic axes. Any browser shows it.

Two panels of points need no library: one for plots would be the largest that this package needs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_COLOURS = "#1b6ca8", "#d1495b", "#8fb8d8", "#eaa5ae"
_SIDE, _MARGIN = 320, 60  # of a panel, in pixels


class Panel(NamedTuple):
  """One diagram.

  Attributes:
    title: what is drawn, with its unit.
    x_title: of the horizontal axis.
    lines: the points (x, y) of each, all above zero.
  """

  title: str
  x_title: str
  lines: Mapping[str, Sequence[tuple[float, float]]]


def log_plot(panels: Sequence[Panel]) -> str:
  """Draws panels side by side."""
  pitch = _SIDE + 2 * _MARGIN
  drawn = [
    f'<g transform="translate({number * pitch + _MARGIN},{_MARGIN})">{_draw(panel)}</g>'
    for number, panel in enumerate(panels)
  ]
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * pitch}" height="{pitch}" '
    'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    f"{''.join(drawn)}</svg>\n"
  )


def _draw(panel: Panel) -> str:
  """The axes, lines and legend of one panel."""
  points = [point for line in panel.lines.values() for point in line]
  (x_place, x_ticks), (y_place, y_ticks) = (_axis(values) for values in zip(*points, strict=True))
  parts = [f'<rect width="{_SIDE}" height="{_SIDE}" fill="none" stroke="black"/>']
  parts.append(_text(0, -10, panel.title, "start"))
  parts.append(_text(_SIDE / 2, _SIDE + 40, panel.x_title))
  for tick in x_ticks:
    parts.append(_text(x_place(tick), _SIDE + 18, f"{tick:,g}"))
  for tick in y_ticks:
    y = _SIDE - y_place(tick)
    parts.append(f'<path d="M0 {y:.1f}h{_SIDE}" stroke="#ddd"/>')
    parts.append(_text(-6, y + 4, f"{tick:,g}", "end"))
  for number, (name, line) in enumerate(panel.lines.items()):
    colour = _COLOURS[number % len(_COLOURS)]
    places = [(x_place(x), _SIDE - y_place(y)) for x, y in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    parts.append(_text(10, 20 + 16 * number, name, "start", colour))
  return "".join(parts)


def _axis(values):
  """A function from a value to its place in pixels, and the powers of ten to mark."""
  first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
  last = max(last, first + 1)

  def place(value):
    """Pixels from the lower end of the axis."""
    return _SIDE * (math.log10(value) - first) / (last - first)

  return place, [10.0**power for power in range(first, last + 1)]


def _text(x, y, words, anchor="middle", colour="black"):
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
  )
