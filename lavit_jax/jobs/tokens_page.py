"""A page about the visual tokens of a data set: how many, which, of what."""

import math
import os
import pathlib
from typing import Any

import numpy as np

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data.caches import codes
from lavit_jax.evaluate.report import figures, page, plots

_COUNTED = 20_000  # images whose codes are counted
_SHOWN = 12  # images with few, with usual and with many tokens
_SIDE = 200  # pixels of these
_BARS = 14


def write(
  cache: codes.CodeCache, source: examples.Source, path: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes the page, which loads nothing from elsewhere, and returns its path.

  Args:
    cache: of the source's images.
    source: that was tokenized.
    path: of the page.

  Raises:
    errors.DataError: it cannot be written, or the cache is damaged.
  """
  counts = np.asarray(cache.counts)
  good = np.flatnonzero(counts > 0)
  used = _usage(cache, good)
  report = page.Report(
    title=f"Visual tokens: {source.name}",
    subtitle="How many patches of an image are kept, and which codes they get.",
    metrics=_metrics(cache, counts, good, used),
    sections=[
      _distributions(counts[good], used, cache),
      _images(cache, source, good),
    ],
  )
  try:
    return page.write(report, path)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be written ({error}).") from error


def _usage(cache, good) -> np.ndarray:
  """Returns how often each code occurs in some of the images, int64[codes]."""
  used = np.zeros(cache.meta.num_codes, np.int64)
  for i in _spread(good, _COUNTED):
    used += np.bincount(cache.codes(i), minlength=len(used))
  return used


def _spread(numbers, most) -> list[int]:
  """Returns some of the numbers, evenly spread."""
  places = np.linspace(0, len(numbers) - 1, min(len(numbers), most))
  return numbers[places.astype(int)].tolist() if len(numbers) else []


def perplexity(used: np.ndarray) -> float:
  """Returns the number of equally frequent codes that would say as much.

  Args:
    used: int[codes], how often each occurs.
  """
  share = used[used > 0] / max(used.sum(), 1)
  return float(np.exp(-(share * np.log(share)).sum()))


def _metrics(cache, counts, good, used) -> list[page.Metric]:
  bad = int((counts < 0).sum())
  mean = float(counts[good].mean()) if len(good) else 0.0
  return [
    page.Metric(name="images", value=len(counts)),
    page.Metric(name="bad images", value=bad),
    page.Metric(
      name="mean tokens", value=mean, note=f"of {cache.num_patches} patches"
    ),
    page.Metric(
      name="codes in use",
      value=int((used > 0).sum()),
      note=f"of {len(used):,}, in {min(len(good), _COUNTED):,} images",
    ),
    page.Metric(name="perplexity of the codes", value=perplexity(used)),
  ]


def _distributions(counts, used, cache) -> page.Section:
  blocks: list[Any] = []
  if len(counts):
    edges = np.linspace(0, cache.num_patches, _BARS + 1)
    inside = np.histogram(counts, edges)[0]
    bars = {
      f"{edges[k]:.0f} – {edges[k + 1]:.0f}": float(inside[k])
      for k in range(_BARS)
    }
    chart = plots.bar_chart(bars, title="kept patches")
    blocks.append(page.Figure(image=chart, title="Images by kept patches"))
  ordered = np.sort(used[used > 0])[::-1] / max(used.sum(), 1)
  if len(ordered):
    points = [(rank + 1, float(share)) for rank, share in enumerate(ordered)]
    step = max(1, len(points) // 400)
    chart = plots.line_chart(
      {"share": points[::step]}, title="share of a code, by its rank"
    )
    blocks.append(page.Figure(image=chart, title="How often codes occur"))
  return page.Section(title="Distributions", blocks=blocks)


def _images(cache, source, good) -> page.Section:
  """Returns images from few tokens to many, with the patches that are kept."""
  by_count = good[np.argsort(cache.counts[good], kind="stable")]
  side = math.isqrt(cache.num_patches)
  rows: list[list[Any]] = []
  for i in _spread(by_count, _SHOWN):
    try:
      image = source.image(i)
    except image_io.ImageError:
      continue  # it was good when it was tokenized
    kept = figures.overlay_mask(
      image, cache.keep(i), size=_SIDE, grid=(side, side)
    )
    text = f"{int(cache.counts[i])} tokens: {source.image_key(i)}"
    rows.append([figures.fit(image, _SIDE), kept, text])
  labels = ("image", "kept patches", "")
  blocks = [page.Gallery(rows=rows, labels=labels)] if rows else []
  return page.Section(
    title="From few tokens to many",
    text="Bright patches are kept; the others are merged into them.",
    blocks=blocks,
  )
