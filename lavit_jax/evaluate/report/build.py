"""Writes the report of a quickstart: metrics, examples and curves."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lavit_jax.evaluate import suite
from lavit_jax.evaluate.report import figures, page
from lavit_jax.infer import pipeline
from lavit_jax.train.telemetry import writers

# Bounds (low, high) that the embedded default must meet (README).
FLOORS = {
  "caption_attributes": (0.60, None),
  "t2i_attributes": (0.35, None),
  "recon_gain": (0.6, None),
  "recon_gain_objects": (0.4, None),
  "codes_used_share": (0.8, None),
  "kept_share": (0.28, 0.40),
  "object_lift": (1.5, None),
}
_STAGES = ("encoder", "tokenizer", "pixels", "pretrain")


def write(
  workdir: str | os.PathLike,
  lavit: pipeline.LaVIT,
  metrics: Mapping[str, Any],
  exhibits: suite.Exhibits,
) -> pathlib.Path:
  """Writes DIR/report/index.html and metrics.json.

  Args:
    workdir: DIR, of the quickstart.
    lavit: the model.
    metrics: from `suite.evaluate`, and "seconds" of each stage if known.
    exhibits: from `suite.evaluate`.

  Returns:
    The folder DIR/report.
  """
  folder = pathlib.Path(workdir) / "report"
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(metrics, indent=1, sort_keys=True)
  (folder / "metrics.json").write_text(text + "\n")
  report = page.Report(
    title="LaVIT, trained from scratch",
    subtitle=(
      "All numbers and images below are of held-out data, with deterministic"
      " token selection."
    ),
    metrics=_headline(metrics),
    facts={
      f"parameters of {part}": count
      for part, count in metrics["parameters"].items()
    },
    seconds=metrics.get("seconds", {}),
    sections=[s for s in _sections(lavit, metrics, exhibits) if s.blocks],
    curves=_curves(pathlib.Path(workdir)),
  )
  page.build(report, folder)
  return folder


def _headline(metrics):
  cards = []
  floors = dict(FLOORS)
  if "vqa_majority" in metrics:
    floors["vqa_accuracy"] = (metrics["vqa_majority"] + 0.1, None)
  names = (
    "caption_attributes",
    "caption_exact",
    "vqa_accuracy",
    "t2i_attributes",
    "edit_attributes",
    "recon_gain",
    "recon_gain_objects",
    "codes_used_share",
    "perplexity",
    "kept_share",
    "object_lift",
  )
  for name in names:
    if name in metrics:
      low, high = floors.get(name, (None, None))
      cards.append(
        page.Metric(name=name, value=metrics[name], low=low, high=high)
      )
  return cards


def _sections(lavit, metrics, exhibits):
  yield _tokens_section(lavit, metrics, exhibits)
  yield page.Section(
    title="Captions and answers",
    text="The image enters as continuous tokens of the merger.",
    blocks=[
      *_gallery(exhibits.captions, ("image", "reference", "model")),
      *_gallery(exhibits.answers, ("image", "question", "answer", "model")),
    ],
  )
  yield page.Section(
    title="Generated images and edits",
    text="The LLM generates visual tokens; the pixel decoder decodes them.",
    blocks=[
      *_gallery(exhibits.drawings, ("prompt", "generated")),
      *_gallery(exhibits.edits, ("image", "instruction", "generated")),
    ],
  )
  rows = [
    [name, value]
    for name, value in sorted(metrics.items())
    if isinstance(value, int | float)
  ]
  yield page.Section(
    title="All metrics",
    blocks=[page.Table(columns=("metric", "value"), rows=rows)],
  )


def _gallery(rows, labels):
  if not rows:
    return []
  return [page.Gallery(rows=[list(row) for row in rows], labels=labels)]


def _tokens_section(lavit, metrics, exhibits):
  """Returns the section of kept patches, reconstructions and visual tokens."""
  blocks = []
  if exhibits.images:
    side = math.isqrt(lavit.visual.num_patches)
    rows = [
      [
        figures.fit(image, 144),
        figures.overlay_mask(image, keep, size=144, grid=(side, side)),
        figures.fit(redrawn, 144),
      ]
      for image, keep, redrawn in zip(
        exhibits.images, exhibits.keeps, exhibits.redrawn, strict=True
      )
    ]
    labels = ("image", "kept patches", "decoded from its tokens")
    blocks.append(page.Gallery(rows=rows, labels=labels))
  if "recon_gain_random" in metrics:
    names = {
      "": "learned selection",
      "_sampled": "learned, sampled",
      "_random": "random mask of the same share",
      "_no_codes": "without quantizer",
    }
    rows = [
      [
        label,
        metrics[f"recon_gain{suffix}"],
        metrics.get(f"recon_gain_objects{suffix}"),
      ]
      for suffix, label in names.items()
    ]
    columns = ("tokens", "recon_gain", "recon_gain_objects")
    blocks.append(page.Table(columns=columns, rows=rows))
  if exhibits.code_patches:
    common = sorted(
      exhibits.code_patches.items(), key=lambda kv: (-len(kv[1]), kv[0])
    )[:64]
    blocks.append(
      page.Figure(
        image=figures.codebook_sheet(dict(sorted(common))),
        title="Codebook",
        caption="Patches with the same visual token.",
      )
    )
  return page.Section(
    title="Images to visual tokens",
    text="Bright patches are kept; the others are merged into them.",
    blocks=blocks,
  )


def _curves(workdir):
  """Returns points by stage and metric, from each stage's metrics.jsonl."""
  curves = {}
  for stage in _STAGES:
    path = workdir / stage / "metrics.jsonl"
    if not path.exists():
      continue
    points: dict[str, list] = {}
    for row in writers.read_json_lines(path):
      for name, value in row.items():
        if name not in ("step", "time") and isinstance(value, int | float):
          points.setdefault(name, []).append((row["step"], value))
    curves[stage] = points
  return curves
