"""Renders a report as one self-contained HTML file.

The dataclasses below are the content, the rest of the module is the layout.
Texts are escaped, images are PNG in base64, charts are inline SVG; the page
loads nothing from elsewhere.
"""

import base64
import dataclasses
import html
import io
import numbers
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from lavit_jax.core.storage import files
from lavit_jax.evaluate.report import figures, plots

Cell = figures.ImageLike | str | float | int | None
_NUMBER = ' class="number"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """A headline number; with bounds it is marked as met or missed.

  Attributes:
    name: of the metric.
    value: of the metric.
    low: smallest value that is good; None: no such bound.
    high: largest value that is good; None: no such bound.
    note: a text below the number.
  """

  name: str
  value: float
  low: float | None = None  # met when low <= value <= high
  high: float | None = None
  note: str = ""

  @property
  def met(self) -> bool | None:
    """Whether the value is within its bounds; None without bounds."""
    if self.low is None and self.high is None:
      return None
    above = self.low is None or self.value >= self.low
    return above and (self.high is None or self.value <= self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table of texts, numbers or small images.

  Attributes:
    columns: their names.
    rows: a cell for each column; a dash stands for None.
    title: above the table.
    note: below the title.
  """

  columns: Sequence[str]
  rows: Sequence[Sequence[Cell]]
  title: str = ""
  note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
  """An image, or a chart from `plots`, with a title and a caption."""

  image: figures.ImageLike | str
  title: str = ""
  caption: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
  """Cards of images and texts.

  Attributes:
    rows: the entries of each card: images or texts.
    labels: a label for each entry: ("image", "reference", "model") fits rows
      of (image, text, text).
    title: above the cards.
    note: below the title.
    right: for each card whether the model was right, or None.
  """

  rows: Sequence[Sequence[figures.ImageLike | str]]
  labels: Sequence[str]
  title: str = ""
  note: str = ""
  right: Sequence[bool] | None = None

  def __post_init__(self):
    for i, row in enumerate(self.rows):
      if len(row) != len(self.labels):
        raise ValueError(
          f"gallery {self.title!r}: row {i} has {len(row)} entries for the"
          f" {len(self.labels)} labels {list(self.labels)}; give one for each."
        )
    if self.right is not None and len(self.right) != len(self.rows):
      raise ValueError(
        f"gallery {self.title!r}: {len(self.right)} marks in `right` for"
        f" {len(self.rows)} rows; give one for each, or None."
      )


Block = Table | Figure | Gallery


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A heading, a paragraph and blocks, in this order."""

  title: str
  text: str = ""
  blocks: Sequence[Block] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """The content of a page, in this order.

  Attributes:
    title: of the page.
    subtitle: below it.
    metrics: headline numbers.
    facts: short values by name.
    seconds: duration of each stage.
    sections: the body.
    curves: points (step, value) by stage and metric. Metrics that differ only
      before the last "/" ("train/loss", "eval/loss") share a chart.
  """

  title: str
  subtitle: str = ""
  metrics: Sequence[Metric] = ()
  facts: Mapping[str, str | float | int] = dataclasses.field(
    default_factory=dict
  )
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  sections: Sequence[Section] = ()
  curves: Mapping[str, Mapping[str, plots.Points]] = dataclasses.field(
    default_factory=dict
  )


def build(report: Report, directory: str | os.PathLike) -> pathlib.Path:
  """Writes `index.html` into a directory, and returns its path."""
  return write(report, pathlib.Path(directory) / "index.html")


def write(report: Report, path: str | os.PathLike) -> pathlib.Path:
  """Writes a page as a whole, and returns its path; missing folders are made.

  Raises:
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(files.path_of(path), render(report).encode())
  return path


def render(report: Report) -> str:
  """Returns the page as HTML."""
  sections = list(report.sections)
  titles = [section.title for section in sections]
  titles += ["Training"] if report.curves or report.seconds else []
  links = "".join(f'<a href="#{_anchor(t)}">{_escape(t)}</a>' for t in titles)
  body = [
    f"<header><h1>{_escape(report.title)}</h1>",
    f"<p>{_escape(report.subtitle)}</p>" if report.subtitle else "",
    f"<nav>{links}</nav></header>",
    _metrics(report.metrics),
    _facts(report.facts),
    *map(_section, sections),
    _training(report) if report.curves or report.seconds else "",
  ]
  return _PAGE.format(
    title=_escape(report.title),
    style=_STYLE,
    body="\n".join(filter(None, body)),
  )


def _escape(value) -> str:
  return html.escape(str(value))


def _anchor(title: str) -> str:
  return re.sub(r"\W+", "-", title.lower()).strip("-")


def _number(value) -> str:
  """Formats a number shortly; other values as text."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return str(value)
  if isinstance(value, numbers.Integral):
    return f"{int(value):,}"
  value = float(value)
  return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


def _metrics(metrics: Sequence[Metric]) -> str:
  cards = []
  for metric in metrics:
    state = {None: "", True: " met", False: " missed"}[metric.met]
    bounds = [f"≥ {metric.low:g}"] if metric.low is not None else []
    bounds += [f"≤ {metric.high:g}"] if metric.high is not None else []
    mark = {None: "", True: "✓ ", False: "✗ "}[metric.met]
    notes = [mark + ", ".join(bounds)] if bounds else []
    notes += [metric.note] if metric.note else []
    cards.append(
      f'<div class="metric{state}"><span>{_escape(metric.name)}</span>'
      f"<b>{_escape(_number(metric.value))}</b>"
      f"<small>{_escape(' · '.join(notes))}</small></div>"
    )
  return f'<div class="metrics">{"".join(cards)}</div>' if cards else ""


def _facts(facts: Mapping[str, str | float | int]) -> str:
  pairs = "".join(
    f"<div><dt>{_escape(key)}</dt><dd>{_escape(_number(value))}</dd></div>"
    for key, value in facts.items()
  )
  return f"<dl>{pairs}</dl>" if pairs else ""


def _section(section: Section) -> str:
  text = f"<p>{_escape(section.text)}</p>" if section.text else ""
  renderers: dict[type, Callable[..., str]] = {
    Table: _table,
    Figure: _figure,
    Gallery: _gallery,
  }
  blocks = "\n".join(renderers[type(b)](b) for b in section.blocks)
  head = f'<h2 id="{_anchor(section.title)}">{_escape(section.title)}</h2>'
  return f"<section>{head}{text}{blocks}</section>"


def _image(image: figures.ImageLike, alt: str) -> str:
  buffer = io.BytesIO()
  figures.to_pil(image).save(buffer, format="PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="{_escape(alt)}" src="data:image/png;base64,{data}">'


def _heading(title: str, note: str) -> str:
  return (f"<h3>{_escape(title)}</h3>" if title else "") + (
    f"<p>{_escape(note)}</p>" if note else ""
  )


def _cell(value: Cell) -> str:
  if value is None:
    return "<td>–</td>"
  if isinstance(value, numbers.Real):
    return f"<td{_NUMBER}>{_escape(_number(value))}</td>"
  if isinstance(value, str | int | float):
    return f"<td>{_escape(value)}</td>"
  return f"<td>{_image(value, '')}</td>"


def _table(table: Table) -> str:
  first = table.rows[0] if table.rows else [""] * len(table.columns)
  head = ""
  for name, cell in zip(table.columns, first, strict=True):
    kind = _NUMBER if isinstance(cell, numbers.Real) else ""
    head += f"<th{kind}>{_escape(name)}</th>"
  rows = "".join(
    f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows
  )
  return (
    f'{_heading(table.title, table.note)}<div class="wide"><table><thead><tr>'
    f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
  )


def _figure(figure: Figure) -> str:
  image = figure.image
  if not isinstance(image, str):
    image = _image(image, figure.title or figure.caption)
  caption = _escape(figure.caption)
  return (
    f'{_heading(figure.title, "")}<figure><div class="wide">{image}</div>'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _gallery(gallery: Gallery) -> str:
  cards = []
  for i, row in enumerate(gallery.rows):
    images, texts = [], []
    for label, entry in zip(gallery.labels, row, strict=True):
      name = f"<small>{_escape(label)}</small>" if label else ""
      if isinstance(entry, str):
        texts.append(f"<p>{name}{_escape(entry)}</p>")
      else:
        images.append(f"<span>{_image(entry, label)}{name}</span>")
    state = ""
    if gallery.right is not None:
      state = " met" if gallery.right[i] else " missed"
    row_html = f'<div class="images">{"".join(images)}</div>'
    cards.append(f'<div class="card{state}">{row_html}{"".join(texts)}</div>')
  head = _heading(gallery.title, gallery.note)
  return f'{head}<div class="gallery">{"".join(cards)}</div>'


def _training(report: Report) -> str:
  parts = ['<section><h2 id="training">Training</h2>']
  if report.seconds:
    minutes = {stage: s / 60 for stage, s in report.seconds.items()}
    chart = plots.bar_chart(minutes, title="minutes per stage", unit=" min")
    parts.append(f'<div class="charts">{chart}</div>')
  for stage, metrics in report.curves.items():
    charts: dict[str, dict[str, plots.Points]] = {}
    for name, points in metrics.items():
      split, _, metric = name.rpartition("/")
      if points:
        charts.setdefault(metric, {})[split or "train"] = points
    drawn = "".join(plots.line_chart(s, title=t) for t, s in charts.items())
    parts.append(f'<h3>{_escape(stage)}</h3><div class="charts">{drawn}</div>')
  return "\n".join([*parts, "</section>"])


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { --ink: #1f2430; --faint: #667085; --paper: #f6f7f9; --card: #fff;
  --line: #e3e6eb; --good: #12875a; --bad: #c2372e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef;
  --faint: #98a2b3; --paper: #14171c; --card: #1d2129; --line: #313743;
  --good: #3fc38c; --bad: #ef7067; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 80px;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 8px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 4px 0; max-width: 76ch; }
header p, section > p, small, figcaption, dt { color: var(--faint); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 10px 0 22px; }
a { color: inherit; text-underline-offset: 3px; }
small, figcaption, dt { font-size: 12px; }
.metrics { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.metric, .card, figure, table, .charts svg { background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
.metric { padding: 10px 14px; display: flex; flex-direction: column; }
.metric span { font-size: 12.5px; overflow-wrap: anywhere; }
.metric b { font-size: 24px; font-variant-numeric: tabular-nums; }
.metric small { margin-top: auto; }
.met { border-left: 3px solid var(--good); }
.missed { border-left: 3px solid var(--bad); }
.metric.met small { color: var(--good); }
.metric.missed small { color: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 16px 0 0; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; overflow: hidden; }
th, td { padding: 6px 14px; text-align: left; }
th { font-size: 12.5px; color: var(--faint); font-weight: 600; }
td { border-top: 1px solid var(--line); }
.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td img { width: 72px; image-rendering: pixelated; display: block; }
figure { margin: 8px 0; padding: 12px; width: fit-content; max-width: 100%; }
figure img { display: block; max-width: 100%; border-radius: 4px; }
.gallery { display: flex; flex-wrap: wrap; gap: 12px; }
.card { padding: 10px; }
.card p { margin: 6px 0 0; width: 0; min-width: 100%; font-size: 13.5px; }
.card p small { display: block; line-height: 1.2; }
.images { display: flex; gap: 8px; }
.images span { display: flex; flex-direction: column; }
.images img { width: 144px; border-radius: 4px;
  image-rendering: pixelated; }
.charts { display: flex; flex-wrap: wrap; gap: 10px; }
.charts svg { max-width: 100%; height: auto; }
"""
