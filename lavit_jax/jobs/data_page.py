"""A page about a source of data: samples, sizes, lengths and what is bad."""

import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples, faults
from lavit_jax.evaluate.report import page, plots
from lavit_jax.jobs import check

_SAMPLES = 8  # of each task
_SIDE = 160  # pixels of a sample's longer side
_SHOWN = 600  # characters of a sample
_BAD = 100  # bad ones that are listed
_BINS = 12


def write(found: check.Found, path: str | os.PathLike[str]) -> pathlib.Path:
  """Writes the page, which loads nothing from elsewhere, and returns its path.

  Raises:
    errors.DataError: it cannot be written, or the data have changed.
  """
  summary = found.summary()
  report = page.Report(
    title=f"Data: {found.source.name}",
    subtitle="Look at your data before you train on them.",
    metrics=_metrics(summary),
    facts=_facts(summary),
    sections=[
      *_samples(found.source),
      _distributions(found),
      *_bad(found),
    ],
  )
  try:
    return page.write(report, path)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be written ({error}).") from error


def _metrics(summary) -> list[page.Metric]:
  bad = summary["bad_images"] / max(summary["images"], 1)
  left = summary["left_out"] / max(summary["seen"], 1)
  return [
    page.Metric(name="images", value=summary["images"]),
    page.Metric(name="share of bad images", value=bad, high=faults.LIMIT_SHARE),
    page.Metric(name="share of bad lines", value=left, high=faults.LIMIT_SHARE),
    page.Metric(name="exact duplicates", value=summary["exact_duplicates"]),
    page.Metric(name="near-duplicates", value=summary["near_duplicates"]),
  ]


def _facts(summary) -> dict[str, Any]:
  facts = {f"examples: {t}": n for t, n in summary["examples"].items()}
  facts["megabytes of images"] = round(summary["bytes"] / 1e6, 1)
  for what, side in (
    ("shorter side", summary["shorter_side"]),
    ("width / height", summary["aspect"]),
  ):
    if side:
      facts[f"{what}: least, median, most"] = (
        f"{side['least']:g}, {side['median']:g}, {side['most']:g}"
      )
  return facts


def _samples(source) -> list[page.Section]:
  """Returns a section for each task, and one of images without an example."""
  sections = []
  for task in source.tasks():
    if task == "text_image":
      continue  # the captions again
    count = source.num_examples(task)
    rows = [
      _row(source, source.example(task, i)) for i in _spread(count, _SAMPLES)
    ]
    most = max(map(len, rows))
    rows = [row + [""] * (most - len(row)) for row in rows]
    labels = [f"part {k + 1}" for k in range(most)]
    gallery = page.Gallery(rows=rows, labels=labels)
    sections.append(
      page.Section(title=f"{task}: {count:,} examples", blocks=[gallery])
    )
  if not sections:
    images = [_shown(source, i) for i in _spread(source.num_images, 24)]
    rows = [[image] for image in images]
    gallery = page.Gallery(rows=rows, labels=["image"])
    sections.append(page.Section(title="Images", blocks=[gallery]))
  return sections


def _spread(count, most) -> list[int]:
  numbers = np.linspace(0, count - 1, min(count, most)).astype(int)
  return sorted(set(numbers.tolist()))


def _row(source, example) -> list[Any]:
  """Returns the parts of an example, images small and texts cut."""
  out: list[Any] = []
  for part in example.parts[:6]:
    if isinstance(part, examples.TextPart):
      text = part.text.strip()
      more = " …" if len(text) > _SHOWN else ""
      out.append(f"{text[:_SHOWN]}{more}" if part.weight else f"({text})")
    else:
      out.append(_shown(source, part.image))
  if len(example.parts) > 6:
    out[-1] = f"… {len(example.parts) - 5} more parts"
  return out


def _shown(source, i) -> Image.Image | str:
  try:
    if isinstance(source, examples.HasEncodedImages):
      image = image_io.load(source.encoded(i), name=f"image {i}")
    else:
      image = image_io.to_pil(source.image(i))
  except image_io.ImageError as error:
    return f"bad: {error}"
  image.thumbnail((_SIDE, _SIDE))
  return image


def _distributions(found) -> page.Section:
  good = found.good
  charts = []
  if len(good):
    sides = np.minimum(good["height"], good["width"])
    charts += [
      _histogram("shorter side", sides, "pixels"),
      _histogram("width / height", check.aspects(good), ""),
      _histogram("bytes of an image", good["size"] / 1e3, "thousand"),
    ]
  for task, values in found.characters.items():
    if len(values) and task != "text_image":
      charts.append(_histogram(f"characters: {task}", values, ""))
  return page.Section(title="Sizes and lengths", blocks=charts)


def _histogram(title, values, unit) -> page.Figure:
  """Returns bars of how many values are in each range, by their quantiles."""
  low, high = float(np.min(values)), float(np.quantile(values, 0.99))
  edges = np.linspace(low, max(high, low + 1e-9), _BINS + 1)
  inside = np.clip(np.searchsorted(edges, values, "right") - 1, 0, _BINS - 1)
  counts = np.bincount(inside, minlength=_BINS)
  if low == float(np.max(values)):
    bars = {f"{low:g}": float(len(values))}
  else:
    bars = {
      f"{edges[k]:.3g} – {edges[k + 1]:.3g}": float(counts[k])
      for k in range(_BINS)
    }
  note = f"in {unit}; " if unit else ""
  return page.Figure(
    image=plots.bar_chart(bars, title=title),
    title=title,
    caption=f"{note}the last bar has the largest hundredth, too",
  )


def _bad(found) -> list[page.Section]:
  rows = [*found.lines, *found.bad]
  if not rows:
    return []
  table = page.Table(
    columns=("what", "why it cannot be used"), rows=rows[:_BAD]
  )
  count = found.left_out + len(found.bad)
  text = f"{count:,} in all; the first {min(len(rows), _BAD)} are listed."
  return [page.Section(title="What is bad", text=text, blocks=[table])]
