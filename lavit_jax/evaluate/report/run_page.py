"""Writes the report of one run from the files of its workdir."""

import datetime
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files, log_files
from lavit_jax.evaluate.report import page, plots
from lavit_jax.train.resilience import run_checkpoints
from lavit_jax.train.telemetry import writers

_IMAGES = 4  # largest number of evaluation images
# Metric of metrics.jsonl -> its label: series, then chart.
_SPEED = {
  "time/step_s": "step/seconds per step",
  "time/data_wait_s": "waiting for data/seconds per step",
  "tokens_per_second": "tokens per second",
  "tokens_per_second_per_chip": "tokens per second and chip",
  "examples_per_second": "examples per second",
  "steps_per_second": "steps per second",
  "mfu": "MFU",
  "goodput": "goodput",
  "time/compile_s": "seconds of compilation",
  "time/evaluation_s": "seconds of evaluation",
  "time/checkpoint_s": "seconds of checkpoints",
}
_MEMORY = {
  "memory/device_gb": "in use/device GB",
  "memory/device_peak_gb": "peak/device GB",
  "memory/device_limit_gb": "available/device GB",
  "memory/host_gb": "host GB",
}
_HIDDEN = {"data_wait_share"}
_CARDS = {
  "loss": "loss, last",
  "held_out/loss": "held-out loss, last",
  "tokens_per_second_per_chip": "tokens per second and chip",
  "time/step_s": "seconds per step",
  "mfu": "MFU",
  "goodput": "goodput",
}
_ACTIVITIES = {
  "kept": "steps that were kept",
  "compile": "compilation",
  "data_wait": "waiting for data",
  "evaluation": "evaluation",
  "checkpoint": "checkpoints",
  "start": "starting",
}


def write(
  workdir: str | os.PathLike, out: str | os.PathLike
) -> os.PathLike[str]:
  """Writes the page of a workdir to a file.

  Args:
    workdir: of a training run.
    out: the file.

  Returns:
    The path of the file.

  Raises:
    errors.UsageError: `workdir` is not one, or `out` is a folder.
  """
  path = files.path_of(out)
  if path.is_dir():
    raise errors.UsageError(
      f"--out {path} is a folder; expected a file to write. Try --out"
      f" {path / 'report.html'}."
    )
  text = page.render(report(files.input_path(workdir)))
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, text.encode())
  return path


def report(workdir: pathlib.Path) -> page.Report:
  """Returns the content of the page of a workdir; see `write`."""
  config = _config(workdir)
  # The first line holds the config.
  rows = [row for row in _read(workdir / "metrics.jsonl") if "step" in row]
  if not rows:
    raise errors.UsageError(
      f"{workdir} has no metrics yet: a run writes the first to metrics.jsonl"
      f" after {config.get('log', {}).get('every', 'some')} steps. Try again"
      " later."
    )
  found, kept = writers.curves(rows), _read(workdir / writers.GOODPUT)
  sections = [_time(kept), _checkpoints(workdir, found), _images(workdir)]
  sections.append(_settings(config))
  return page.Report(
    title=f"Run {files.absolute(workdir).name}",
    subtitle=(
      f"Stage {config.get('stage', 'unknown')}, in {files.absolute(workdir)}."
    ),
    metrics=[
      page.Metric(name=label, value=found[name][-1][1])
      for name, label in _CARDS.items()
      if name in found
    ],
    facts=_facts(config, rows, kept),
    sections=[section for section in sections if section is not None],
    curves=_curves(found),
  )


def _config(workdir: pathlib.Path) -> Mapping[str, Any]:
  """Reads the config of a run; raises UsageError if there is none."""
  path = workdir / "config.json"
  if path.exists():
    return json.loads(path.read_text())
  if not workdir.is_dir():
    raise errors.UsageError(
      f"{workdir} is no directory. Give the --workdir of a `lavit train`."
    )
  folders = sorted(p for p in workdir.iterdir() if p.is_dir())
  inside = [p.name for p in folders if (p / "config.json").exists()]
  hint = f"Give one of the runs in it: {', '.join(inside)}." if inside else ""
  raise errors.UsageError(
    f"{workdir} is no workdir of a run: it has no config.json."
    f" {hint or 'Give the --workdir of a `lavit train`.'}"
  )


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  return writers.read_json_lines(path) if log_files.pieces(path) else []


def _facts(config, rows, kept) -> dict[str, Any]:
  """Returns short facts about a run."""
  last = rows[-1]
  facts = {
    "step": max(row.get("step", 0) for row in rows),
    "batch size": config.get("batch_size", 0),
    "mesh": _mesh(config),
    "last line": _moment(last["time"]) if "time" in last else "",
  }
  if kept:
    begin, end = kept[0]["first_start"], max(last["time"], kept[-1]["time"])
    facts["first start"] = _moment(begin)
    facts["wall clock"] = progress.duration(end - begin)
    facts["starts"] = int(kept[-1]["starts"])
  return {name: value for name, value in facts.items() if value != ""}


def _mesh(config) -> str:
  axes = config.get("mesh", {})
  used = [f"{name} {size}" for name, size in axes.items() if size != 1]
  return ", ".join(used).replace("-1", "the rest") or "one device"


def _moment(seconds: float) -> str:
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.strftime("%Y-%m-%d %H:%M UTC")


def _curves(found) -> dict[str, dict[str, plots.Points]]:
  """Returns groups of charts: losses, speed, memory, other metrics."""
  known = set(_SPEED) | set(_MEMORY) | _HIDDEN
  names = [name for name in found if name not in known]
  losses = [name for name in names if name.rpartition("/")[2].endswith("loss")]
  rate = [name for name in names if "learning_rate" in name]
  rest = [name for name in names if name not in {*losses, *rate}]
  in_order = lambda chosen: {name: found[name] for name in sorted(chosen)}
  renamed = lambda table: {
    label: found[name] for name, label in table.items() if name in found
  }
  groups = {
    "Losses": in_order(losses) | in_order(rate),
    "Speed": renamed(_SPEED),
    "Memory": renamed(_MEMORY),
    "Other metrics": in_order(rest),
  }
  return {title: charts for title, charts in groups.items() if charts}


def _time(kept: Sequence[Mapping[str, Any]]) -> page.Section | None:
  """Returns a chart of the wall-clock time, and a table of the starts."""
  if not kept:
    return None
  last = kept[-1]
  spent = {
    label: last.get(f"{name}_s", 0.0) / 60
    for name, label in _ACTIVITIES.items()
  }
  wall = (last["time"] - last["first_start"]) / 60
  spent["lost or stopped"] = max(wall - sum(spent.values()), 0.0)
  chart = plots.bar_chart(spent, unit=" min", width=560, left=150)
  starts: list[list[page.Cell]] = []
  count = 0
  for row in kept:
    if row["starts"] > count:
      count = row["starts"]
      starts.append([int(count), int(row["step"]), _moment(row["time"])])
  return page.Section(
    title="Where the time went",
    text=(
      "Minutes from the first start to the last checkpoint. Lost: steps that a"
      " killed run had to repeat, and the time in which nothing ran."
    ),
    blocks=[
      page.Figure(image=chart),
      page.Table(columns=("start", "from step", "at"), rows=starts),
    ],
  )


def _checkpoints(workdir, found) -> page.Section | None:
  """Returns a table of the checkpoints with their held-out metrics."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  steps = sorted(int(name) for name in names if name.isdecimal())
  if not steps:
    return None
  names = [name for name in sorted(found) if name.startswith("held_out/")][:6]
  held_out = {name: dict(found[name]) for name in names}
  rows: list[list[page.Cell]] = [
    [step, _megabytes(folder / str(step))]
    + [held_out[name].get(step) for name in names]
    for step in steps
  ]
  columns = ["step", "MB", *(n.removeprefix("held_out/") for n in names)]
  return page.Section(
    title="Checkpoints", blocks=[page.Table(columns=columns, rows=rows)]
  )


def _megabytes(folder: pathlib.Path) -> float:
  return sum(run_checkpoints.sizes(folder).values()) / 1e6


def _images(workdir) -> page.Section | None:
  """Returns some evaluation images, with the first and the last."""
  folder = workdir / "pictures"
  entries = folder.iterdir() if folder.exists() else ()
  paths = sorted(path for path in entries if path.suffix == ".png")
  if not paths:
    return None
  indices = np.linspace(0, len(paths) - 1, min(len(paths), _IMAGES))
  blocks = []
  for path in (paths[i] for i in indices.round().astype(int)):
    with Image.open(io.BytesIO(path.read_bytes())) as file:
      image = file.convert("RGB")
    blocks.append(page.Figure(image=image, caption=f"step {int(path.stem)}"))
  return page.Section(title="Evaluation images", blocks=blocks)


def _settings(config) -> page.Section:
  """Returns a table of all fields of the config."""
  rows = [[name, value] for name, value in _flat(config)]
  return page.Section(
    title="Config", blocks=[page.Table(columns=("field", "value"), rows=rows)]
  )


def _flat(value, prefix=""):
  """Yields (dotted name, text) of every leaf of nested dictionaries."""
  if isinstance(value, Mapping) and value:
    for key in sorted(value):
      yield from _flat(value[key], f"{prefix}{key}.")
    return
  yield prefix.removesuffix("."), json.dumps(value)
