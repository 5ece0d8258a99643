"""Charts: well-formed SVG whose lines stand where the numbers are."""

import re
import xml.etree.ElementTree as ET

import pytest

from lavit_jax.evaluate.report import plots


def lines(svg):
  found = []
  for node in ET.fromstring(svg).iter("polyline"):
    pairs = [pair.split(",") for pair in node.get("points").split()]
    found.append([(float(x), float(y)) for x, y in pairs])
  return found


def texts(svg):
  return [node.text for node in ET.fromstring(svg).iter("text")]


def test_a_line_runs_from_corner_to_corner_of_its_range():
  svg = plots.line_chart({"loss": [(0, 1.0), (50, 2.0), (100, 3.0)]})
  ((first, middle, last),) = lines(svg)
  assert first[0] < middle[0] < last[0]
  assert first[1] > middle[1] > last[1]  # y grows downwards
  assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.11)
  assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.11)


def test_two_series_share_axes_and_have_a_legend():
  svg = plots.line_chart({"train": [(0, 0.0), (9, 1.0)], "eval": [(9, 0.0)]})
  assert {"train", "eval"} <= set(texts(svg))
  (train,) = [line for line in lines(svg) if len(line) == 2]
  circle = next(ET.fromstring(svg).iter("circle"))  # one point is a dot
  assert float(circle.get("cx")) == train[1][0]
  assert float(circle.get("cy")) == train[0][1]


def test_a_long_line_is_averaged_down():
  points = [(i, float(i % 2)) for i in range(10_000)]
  (line,) = lines(plots.line_chart({"loss": points}))
  assert 100 < len(line) <= 240
  heights = {y for _, y in line}
  assert len(heights) == 1  # each mean is one half


def test_a_falling_loss_over_decades_gets_a_logarithmic_axis():
  points = [(i, 100 * 0.5**i) for i in range(20)]
  ((*_, a, b, c),) = lines(plots.line_chart({"loss": points}))
  assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11)
  assert "0.1" in texts(plots.line_chart({"loss": points}))


@pytest.mark.parametrize("points", [[(3, 2.0)], [(0, 0.0), (5, 0.0)], []])
def test_charts_without_extent_are_still_drawn(points):
  svg = plots.line_chart({"x": points}, title="a & <b>")
  assert "a & <b>" in texts(svg)
  assert not re.search("nan|inf", svg)
  marks = [*ET.fromstring(svg).iter("circle"), *lines(svg)]
  assert bool(marks) == bool(points)


def test_bars_are_as_long_as_their_values():
  svg = plots.bar_chart({"encoder": 5.0, "a<b": 2.5, "none": 0.0}, unit=" min")
  widths = [float(r.get("width")) for r in ET.fromstring(svg).iter("rect")]
  assert widths[0] == pytest.approx(2 * widths[1])
  assert widths[2] == 0
  assert {"a<b", "2.5 min"} <= set(texts(svg))
  ET.fromstring(plots.bar_chart({}))


def test_ticks_are_round_numbers_in_range():
  assert plots.ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
  assert plots.ticks(-1, 1) == [-1, -0.5, 0, 0.5, 1]
  for low, high in ((0.3, 0.33), (17, 90_000), (-2e-9, 5e-9)):
    found = plots.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= value <= high for value in found)


@pytest.mark.parametrize(
  ("value", "text"),
  [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (1e-5, "1e-5"), (2.5e6, "2.5e6")],
)
def test_numbers_on_axes_are_short(value, text):
  assert plots.tick(value) == text


def test_colors_are_written_out_so_that_a_chart_stands_alone():
  svg = plots.line_chart({"loss": [(0, 1.0), (1, 2.0)]})
  assert re.search('stroke="#[0-9a-f]{6}"', svg)
