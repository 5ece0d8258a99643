"""Line and bar charts as inline SVG, without a plotting library."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

COLORS = ("#2f6fde", "#e8743b", "#19a979", "#945ecf", "#d64550", "#6c8893")
_POINTS = 240  # longer lines are averaged down to so many points
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 26, 22


def line_chart(
  series: Mapping[str, Points],
  *,
  title: str = "",
  width: int = 340,
  height: int = 190,
) -> str:
  """Returns an SVG of named lines over a common x axis.

  The y axis is logarithmic if all values are positive and half of them are
  below a tenth of the largest. Long lines are averaged down.

  Args:
    series: points (x, y) in order of x, by name; empty lines are left out.
    title: above the chart.
    width: in pixels.
    height: in pixels.
  """
  lines = {k: _thin(points) for k, points in series.items() if points}
  all_points = [point for points in lines.values() for point in points]
  if not all_points:
    return _svg(width, height, title, [_text(width / 2, height / 2, "no data")])
  values = [y for _, y in all_points]
  low, high = min(values), max(values)
  log = low > 0 and statistics.median(values) < 0.1 * high
  xs = [x for x, _ in all_points]
  x_range = _widen(min(xs), max(xs))
  y_range = _widen(low, high, log=log)

  def place(x: float, y: float) -> tuple[float, float]:
    across = (x - x_range[0]) / (x_range[1] - x_range[0])
    up = (_scale(y, log) - y_range[0]) / (y_range[1] - y_range[0])
    return (
      _LEFT + across * (width - _LEFT - _RIGHT),
      height - _BOTTOM - up * (height - _TOP - _BOTTOM),
    )

  parts = _axes(place, x_range, y_range, log, width, height)
  for i, points in enumerate(lines.values()):
    color = COLORS[i % len(COLORS)]
    placed = [place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts.append(
      f'<polyline points="{path}" fill="none" stroke="{color}"'
      ' stroke-width="1.6" stroke-linejoin="round"/>'
    )
    if len(points) == 1:
      x, y = placed[0]
      parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
  if len(lines) > 1:
    parts += _legend(list(lines), width)
  return _svg(width, height, title, parts)


def bar_chart(
  values: Mapping[str, float],
  *,
  title: str = "",
  unit: str = "",
  width: int = 340,
  left: int = 110,
) -> str:
  """Returns an SVG of horizontal bars, with names left and values right.

  Args:
    values: by name.
    title: above the chart.
    unit: after each value.
    width: in pixels.
    left: width of the names in pixels.
  """
  row, right = 22, 70
  height = _TOP + row * max(len(values), 1) + 6
  largest = max([*values.values(), 1e-12])
  parts = []
  for i, (name, value) in enumerate(values.items()):
    y = _TOP + row * i
    length = max(value, 0.0) / largest * (width - left - right)
    parts += [
      _text(left - 6, y + 13, name, anchor="end"),
      f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{row - 8}"'
      f' rx="2" fill="{COLORS[0]}"/>',
      _text(left + length + 5, y + 13, f"{tick(value)}{unit}", anchor="start"),
    ]
  return _svg(width, height, title, parts)


def tick(value: float) -> str:
  """Formats a number for an axis: 1500 gives "1.5k", 0.00001 "1e-5"."""
  if value == 0:
    return "0"
  size = abs(value)
  if size >= 1e6 or size < 1e-3:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value / 1e3:.3g}k" if size >= 1e3 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` round numbers within [low, high]."""
  step = 10.0 ** math.floor(math.log10((high - low) / count))
  factor = next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= count)
  step *= factor
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def _thin(points: Points) -> list[tuple[float, float]]:
  """Averages runs of neighbours, so that at most _POINTS are left."""
  run = -(-len(points) // _POINTS)
  if run == 1:
    return list(points)
  means = []
  for i in range(0, len(points), run):
    x, y = zip(*points[i : i + run], strict=True)
    means.append((sum(x) / len(x), sum(y) / len(y)))
  return means


def _scale(y: float, log: bool) -> float:
  return math.log10(y) if log else y


def _widen(low: float, high: float, *, log: bool = False):
  """Returns the scaled range; an empty range is widened around its value."""
  low, high = _scale(low, log), _scale(high, log)
  if high > low:
    return low, high
  margin = 0.5 * abs(low) or 0.5
  return low - margin, high + margin


def _axes(place, x_range, y_range, log, width, height) -> list[str]:
  """Returns grid lines with numbers; `place` maps values to pixels."""
  parts = []
  y_values = _log_ticks(*y_range) if log else ticks(*y_range)
  for value in y_values:
    y = place(x_range[0], value)[1]
    parts.append(
      f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
      ' stroke="currentColor" opacity="0.15"/>'
    )
    parts.append(_text(_LEFT - 5, y + 3.5, tick(value), anchor="end"))
  bottom = 10.0 ** y_range[0] if log else y_range[0]
  for value in ticks(*x_range):
    x = place(value, bottom)[0]
    parts.append(_text(x, height - 6, tick(value), anchor="middle"))
  return parts


def _log_ticks(low: float, high: float) -> list[float]:
  """Returns at most five powers of ten in the range."""
  first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
  skip = max(1, -(-(last - first + 1) // 5))
  return [10.0**e for e in range(first, last + 1, skip)]


def _legend(names: Sequence[str], width: int) -> list[str]:
  parts, x = [], float(width - _RIGHT)
  for i, name in reversed(list(enumerate(names))):
    parts.append(_text(x, 15, name, anchor="end"))
    x -= 6.2 * len(name) + 6
    color = COLORS[i % len(COLORS)]
    parts.append(
      f'<rect x="{x - 8:.1f}" y="8" width="8" height="8" rx="2"'
      f' fill="{color}"/>'
    )
    x -= 16
  return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="10.5"'
    f' fill="currentColor" opacity="0.75">{html.escape(text)}</text>'
  )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
  name = html.escape(title)
  head = (
    f'<text x="4" y="15" font-size="12" font-weight="600"'
    f' fill="currentColor">{name}</text>'
  )
  return (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    f' role="img" aria-label="{name}" font-family="system-ui, sans-serif">'
    f"{head}{''.join(parts)}</svg>"
  )
