"""The report of one run: what its workdir says, on one page."""

import datetime
import io
import json
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

_IMAGES = 4  # shown at most
# Metric of metrics.jsonl -> what it is called: series, then chart.
_SPEED = {
  "time/step_s": "step/seconds a step",
  "time/data_wait_s": "waiting for data/seconds a step",
  "tokens_per_second": "tokens a second",
  "tokens_per_second_per_chip": "tokens a second and chip",
  "examples_per_second": "examples a second",
  "steps_per_second": "steps a second",
  "mfu": "MFU",
  "goodput": "goodput",
  "time/compile_s": "seconds of compilation",
  "time/evaluation_s": "seconds of evaluation",
  "time/checkpoint_s": "seconds of checkpoints",
}
_MEMORY = {
  "memory/device_gb": "in use/device GB",
  "memory/device_peak_gb": "most so far/device GB",
  "memory/device_limit_gb": "there/device GB",
  "memory/host_gb": "host GB",
}
_HIDDEN = {"data_wait_share"}
_CARDS = {
  "loss": "loss, last",
  "held_out/loss": "held-out loss, last",
  "tokens_per_second_per_chip": "tokens a second and chip",
  "time/step_s": "seconds a step",
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


def write(workdir, out) -> pathlib.Path:
  """Writes the page of a workdir to the file `out`; its path.

  Raises:
    errors.UsageError: `workdir` is not one, or `out` is a folder.
  """
  workdir, out = files.place(workdir), files.path_of(out)
  if out.is_dir():
    raise errors.UsageError(
      f"--out {out} is a folder; expected a file to write. Try --out"
      f" {out / 'report.html'}."
    )
  text = page.render(report(workdir))
  out.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(out, text.encode())
  return out


def report(workdir: pathlib.Path) -> page.Report:
  """What stands on the page of a workdir; see `write`."""
  config = _config(workdir)
  rows = _read(workdir / "metrics.jsonl")
  if not rows:
    raise errors.UsageError(
      f"{workdir} has no metrics yet: the first stand in metrics.jsonl after"
      f" {config.get('log', {}).get('every', 'some')} steps of the run. Try"
      " again later."
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
  """The config of a run; raises UsageError where there is none."""
  path = workdir / "config.json"
  if path.exists():
    return json.loads(path.read_text())
  if not workdir.is_dir():
    raise errors.UsageError(
      f"{workdir} is no directory. Give the --workdir of a `lavit train`."
    )
  folders = sorted(p for p in workdir.iterdir() if p.is_dir())
  inside = [p.name for p in folders if (p / "config.json").exists()]
  hint = f"It holds those of {', '.join(inside)}: give one." if inside else ""
  raise errors.UsageError(
    f"{workdir} is no workdir of a run: it has no config.json."
    f" {hint or 'Give the --workdir of a `lavit train`.'}"
  )


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  return writers.read_json_lines(path) if log_files.pieces(path) else []


def _facts(config, rows, kept) -> dict[str, Any]:
  """What a run is, in short."""
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
  """Groups of charts: losses first, then speed, then the rest."""
  known = set(_SPEED) | set(_MEMORY) | _HIDDEN
  names = [name for name in found if name not in known]
  losses = [name for name in names if name.rpartition("/")[2].endswith("loss")]
  rate = [name for name in names if "learning_rate" in name]
  rest = [name for name in names if name not in {*losses, *rate}]
  order = lambda chosen: {name: found[name] for name in sorted(chosen)}
  renamed = lambda table: {
    label: found[name] for name, label in table.items() if name in found
  }
  groups = {
    "Losses": order(losses) | order(rate),
    "Speed": renamed(_SPEED),
    "Memory": renamed(_MEMORY),
    "Other metrics": order(rest),
  }
  return {title: charts for title, charts in groups.items() if charts}


def _time(kept: Sequence[Mapping[str, Any]]) -> page.Section | None:
  """Where all the wall-clock time went, and when the run was started."""
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
  starts, seen = [], 0
  for row in kept:
    if row["starts"] > seen:
      seen = row["starts"]
      starts.append([int(seen), int(row["step"]), _moment(row["time"])])
  return page.Section(
    title="Where the time went",
    text=(
      "Minutes since the first start, as of the last checkpoint. Lost: steps"
      " after the checkpoint that a kill went back to, and the time in which"
      " nothing ran."
    ),
    blocks=[
      page.Figure(image=chart),
      page.Table(columns=("start", "from step", "at"), rows=starts),
    ],
  )


def _checkpoints(workdir, found) -> page.Section | None:
  """Checkpoints that are there, and the held-out metrics of their steps."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  steps = sorted(int(name) for name in names if name.isdecimal())
  if not steps:
    return None
  names = [name for name in sorted(found) if name.startswith("held_out/")][:6]
  held_out = {name: dict(found[name]) for name in names}
  rows = [
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
  """Some of the images of evaluations, the first and the last among them."""
  folder = workdir / "pictures"
  there = folder.iterdir() if folder.exists() else ()
  paths = sorted(path for path in there if path.suffix == ".png")
  if not paths:
    return None
  places = np.linspace(0, len(paths) - 1, min(len(paths), _IMAGES))
  blocks = []
  for place in places.round().astype(int):
    with Image.open(io.BytesIO(paths[place].read_bytes())) as image:
      image = image.convert("RGB")
    caption = f"step {int(paths[place].stem)}"
    blocks.append(page.Figure(image=image, caption=caption))
  return page.Section(title="Evaluation images", blocks=blocks)


def _settings(config) -> page.Section:
  """Every field of the config."""
  rows = [[name, value] for name, value in _flat(config)]
  return page.Section(
    title="Config", blocks=[page.Table(columns=("field", "value"), rows=rows)]
  )


def _flat(value, prefix=""):
  """(dotted name, text) of every leaf of nested dictionaries."""
  if isinstance(value, Mapping) and value:
    for key in sorted(value):
      yield from _flat(value[key], f"{prefix}{key}.")
    return
  yield prefix.removesuffix("."), json.dumps(value)
