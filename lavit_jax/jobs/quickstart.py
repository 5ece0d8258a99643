"""Trains every stage in order, on the embedded shapes or a user's data.

encoder -> tokenizer -> code cache -> pixels -> pretrain -> evaluation ->
report. If it is interrupted, the next call skips finished stages and resumes
the unfinished one from its checkpoint.
"""

import importlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from lavit_jax.configs.tiny import common
from lavit_jax.core import agreement, errors
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.data import contents
from lavit_jax.data.sources import kinds
from lavit_jax.evaluate import suite
from lavit_jax.evaluate.report import build as report_build
from lavit_jax.infer import pipeline
from lavit_jax.jobs import tokenize
from lavit_jax.train import loop
from lavit_jax.train import phases as phases_lib
from lavit_jax.train.resilience import workdir as workdir_lib

STAGES = ("encoder", "tokenizer", "codes", "pixels", "pretrain")
# Minutes for the committed steps on two idle cores; --minutes scales steps.
MINUTES = {
  "encoder": 4.7,
  "tokenizer": 5.0,
  "codes": 0.8,
  "pixels": 2.8,
  "pretrain": 4.3,
  "evaluation": 2.5,
}
Path = str | os.PathLike[str]
MakeConfig = Callable[[str], ml_collections.ConfigDict]  # of a stage's name


def run(
  workdir: Path,
  *,
  minutes: float | None = None,
  data: str | None = None,
  fields: Mapping[str, Any] | None = None,
  evaluate_only: bool = False,
  model: str | None = None,
  configs: MakeConfig | None = None,
  scenes: int = 500,
  quiet: bool = False,
) -> dict[str, Any]:
  """Trains everything, evaluates it, writes the report.

  Args:
    workdir: everything is written here; DIR/model is the model.
    minutes: rough budget of the stages; scales every phase's steps by
      minutes / sum(MINUTES). None keeps the committed steps.
    data: a jsonl file or tar archives of the user's images; by default what
      DIR/model was trained on, else the shapes.
    fields: override those of config.data.
    evaluate_only: no training; evaluate `model` (default DIR/model).
    model: a model directory or "tiny"; only with evaluate_only.
    configs: returns the config of a stage, given its name; by default the
      committed ones in configs/tiny.
    scenes: held-out scenes to evaluate on.
    quiet: no progress bars.

  Returns:
    The metrics, as in DIR/report/metrics.json.

  Raises:
    errors.UsageError: arguments contradict each other.
    errors.LavitError: see `train`.
  """
  if model is not None and not evaluate_only:
    raise errors.UsageError(
      "--model names a trained model to evaluate; add --evaluate-only, or"
      " leave --model out to train one."
    )
  files.require_local(workdir, "a quickstart")
  workdir = pathlib.Path(workdir)
  if not evaluate_only:
    train(
      workdir,
      minutes=minutes,
      data=data,
      fields=fields,
      configs=configs,
      quiet=quiet,
    )
  return _evaluate(workdir, model, data, fields, scenes, quiet)


def _evaluate(workdir, model, data, fields, scenes, quiet):
  """Evaluates a model and writes the report; returns the metrics."""
  lavit = pipeline.LaVIT.load(model or workdir / "model")
  began = time.monotonic()
  metrics, exhibits = suite.evaluate(
    lavit,
    data=_data_of(workdir if model is None else None, data, fields),
    scenes=scenes,
    quiet=quiet,
  )
  seconds = round(time.monotonic() - began, 1)
  print(f"evaluation: {seconds:.0f} s")
  metrics["seconds"] = _seconds(workdir) | {"evaluation": seconds}
  folder = report_build.write(workdir, lavit, metrics, exhibits)
  print(f"Report: {folder / 'index.html'}")
  return metrics


def train(
  workdir: Path,
  *,
  minutes: float | None = None,
  data: str | None = None,
  fields: Mapping[str, Any] | None = None,
  configs: MakeConfig | None = None,
  quiet: bool = False,
) -> None:
  """Trains the stages of `run`, without evaluation and report.

  For the arguments see `run`.

  Raises:
    errors.ConfigError: a finished stage was trained with another config.
    errors.DataError: a finished stage was trained on other data.
    errors.LavitError: see `loop.train` and `tokenize.write_caches`.
  """
  workdir = pathlib.Path(workdir)
  files.check_arrays_folder(workdir, write=True)
  workdir.mkdir(parents=True, exist_ok=True)
  stages = _configs(workdir, configs or _committed, minutes, data, fields)
  share = 1.0 if minutes is None else minutes / sum(MINUTES.values())
  _print_budget(stages, share)
  for stage, config in stages.items():
    _check_unchanged(workdir / stage, config)
  for stage in STAGES:
    _once(workdir, stage, lambda s=stage: _run_stage(s, stages, quiet))


def _data_of(workdir, data, fields):
  """Returns config.data of the data to evaluate on.

  These are `data` and `fields`, else the data that the model of `workdir` was
  trained on, else the shapes; workdir is None for a model from elsewhere.
  """
  chosen = common.get_config("pretrain").data.to_dict()
  stored = workdir and workdir / "pretrain" / "config.json"
  if stored and stored.exists():
    chosen = json.loads(stored.read_text())["data"]
  if data:
    path = str(files.absolute(data))
    chosen |= {"kind": kinds.kind_of(path), "path": path, "held_out_path": ""}
  return chosen | dict(fields or {})


def _committed(stage):
  """Returns the config of a stage in configs/tiny."""
  module = importlib.import_module(f"lavit_jax.configs.tiny.{stage}")
  return module.get_config()


def common_batch() -> int:
  """Returns the greatest common divisor of all stages' batch sizes."""
  sizes = [_committed(stage).batch_size for stage in STAGES if stage != "codes"]
  return math.gcd(*sizes)


def _configs(workdir, make, minutes, data, fields=None):
  """Returns the stages' configs, for this workdir and scaled to the budget."""
  configs = {}
  for stage in STAGES:
    if stage == "codes":
      continue
    config = make(stage)
    config.model_dir = str(workdir / "model")
    if data:
      config.data.kind = kinds.kind_of(data)
      config.data.path = str(files.absolute(data))
    config.data.update(fields or {})
    if minutes is not None:
      steps = sum(config.phases[name].steps for name in config.schedule)
      scaled = round(steps * minutes / sum(MINUTES.values()))
      config.steps = max(scaled, 2 * len(config.schedule))
    if stage == "pretrain":
      config.data.cache_dir = str(workdir / "codes" / "train")
      config.data.held_out_cache_dir = str(workdir / "codes" / "held_out")
    configs[stage] = config
  return configs


def _check_unchanged(folder, config):
  """Checks that a stage that was trained before was trained alike.

  Raises:
    errors.ConfigError: its config has changed.
    errors.DataError: its data have changed.
  """
  if not (folder / "config.json").exists():
    return
  stored = json.loads((folder / "config.json").read_text())
  current = json.loads(config.to_json_best_effort())
  for fields in (stored, current):  # a workdir may be moved as a whole
    fields.pop("model_dir")
    for name in ("cache_dir", "held_out_cache_dir"):
      fields["data"].pop(name, None)
  if changed := workdir_lib.differences(stored, current):
    raise errors.ConfigError(
      f"{folder} was trained with another config: {', '.join(changed[:6])}."
      " Give another --workdir, or the options it was trained with."
    )
  part = {"pretrain": "llm"}.get(config.stage, config.stage)
  if part not in checkpoints.parts_in(config.model_dir):
    return
  trained_on = checkpoints.read_meta(config.model_dir, part).get("made_of", {})
  pair = kinds.pair(config.data.to_dict())
  names = ("train_data", "held_out_data")
  digests = {n: contents.of(s) for n, s in zip(names, pair, strict=True)}
  if differences := agreement.fingerprints(trained_on, digests, ""):
    raise errors.DataError(
      f"{folder} was trained on other data than these:"
      f" {'; '.join(map(str, differences))}. Give another --workdir, or the"
      " data that it was trained on."
    )


def _print_budget(configs, share):
  """Prints steps and minutes of each stage, `share` of the committed ones."""
  total = share * sum(MINUTES.values())
  print(f"Stages, about {total:.0f} minutes on two idle CPU cores:")
  for stage, minutes in MINUTES.items():
    text = ""
    if stage in configs:
      phases = phases_lib.phases_of(configs[stage])
      steps = ", ".join(f"{p.name} {p.stop - p.start}" for p in phases)
      text = f"{steps} steps (batch {configs[stage].batch_size})"
    print(f"  {stage:10s} {share * minutes:4.1f} min  {text}")


def _run_stage(stage, configs, quiet):
  """Trains a stage, or writes the code caches."""
  if stage == "codes":
    config = configs["pretrain"]
    out = pathlib.Path(config.data.cache_dir).parent
    tokenize.write_caches(
      config.model_dir, config.data.to_dict(), out, quiet=quiet
    )
    return
  config = configs[stage]
  workdir = pathlib.Path(config.model_dir).parent / stage
  loop.train(config, workdir, quiet=quiet)


def _once(workdir, stage, action):
  """Runs a stage unless it is finished, and adds up its seconds."""
  path = workdir / "stages.json"
  done = json.loads(path.read_text()) if path.exists() else {}
  entry = done.get(stage, {"seconds": 0.0, "finished": False})
  if entry["finished"]:
    print(f"{stage}: done before, {entry['seconds']:.0f} s")
    return
  began = time.monotonic()
  try:
    action()
    entry["finished"] = True
  finally:
    entry["seconds"] += time.monotonic() - began
    done[stage] = entry
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(done, indent=1) + "\n")
    partial.replace(path)
  print(f"{stage}: {entry['seconds']:.0f} s")


def _seconds(workdir) -> dict[str, float]:
  """Returns the seconds that each stage took, over all calls."""
  path = workdir / "stages.json"
  done = json.loads(path.read_text()) if path.exists() else {}
  return {stage: round(done[stage]["seconds"], 1) for stage in done}
