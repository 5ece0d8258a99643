"""One training loop for every stage.

Order of one step: take the batch, hash it, put it on the mesh, update, log,
evaluate, save. The data position moves only with the step that used it, so a
checkpoint at step s resumes with batch s.
"""

import dataclasses
import io
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import checkpoints, errors, images, progress, sharding
from lavit_jax.train import distributed, objectives, optimizer, writers
from lavit_jax.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class Phase:
  """One entry of config.schedule: its settings and the steps it spans."""

  name: str
  start: int
  stop: int
  settings: Mapping[str, Any]

  def __getitem__(self, key):
    return self.settings[key]

  def get(self, key, default=None):
    """The setting `key`, or the default."""
    return self.settings.get(key, default)


def phases_of(config) -> list[Phase]:
  """Phases in the order of config.schedule, with their step ranges.

  With config.steps > 0 the phases are shortened or lengthened in proportion,
  so that they add up to it; each keeps at least one step.

  Raises:
    errors.ConfigError: a phase that is not there, or no steps at all.
  """
  settings = config.phases.to_dict()
  if missing := [name for name in config.schedule if name not in settings]:
    raise errors.ConfigError(
      f"config.schedule names phases {missing}, but config.phases has only"
      f" {sorted(settings)}. Add them, or take them out of the schedule."
    )
  names = [name for name in config.schedule if settings[name]["steps"] > 0]
  if not names:
    raise errors.ConfigError("No phase of config.schedule has steps > 0.")
  ends = np.cumsum([int(settings[name]["steps"]) for name in names])
  if config.steps:
    if config.steps < len(names):
      raise errors.ConfigError(
        f"config.steps={config.steps} is less than one step for each of the"
        f" phases {names}. Raise it, or take phases out of config.schedule."
      )
    ends = np.round(ends * config.steps / ends[-1]).astype(int)
    floor = np.arange(1, len(names) + 1)
    ends = np.clip(ends, floor, config.steps - len(names) + floor)
    ends = np.maximum.accumulate(ends - floor) + floor
  starts = [0, *ends[:-1]]
  return [
    Phase(
      name,
      int(start),
      int(stop),
      settings[name] | {"steps": int(stop - start)},
    )
    for name, start, stop in zip(names, starts, ends, strict=True)
  ]


def train(
  config, workdir, *, stop_at: int | None = None, quiet: bool = False
) -> dict[str, float]:
  """Trains one stage to the end, from its newest checkpoint if it has one.

  Args:
    config: an `ml_collections.ConfigDict`; see `configs/tiny`.
    workdir: checkpoints, logs and events go here.
    stop_at: stop after this step as if interrupted (the state is saved).
    quiet: no progress bar.

  Returns:
    The last held-out metrics. When the last phase is over, the stage's part
    has been written to `config.model_dir`.

  Raises:
    errors.ConfigError: fields that do not fit, or a workdir of another run.
    errors.LavitError: the loss is not finite (the message names the step).
    errors.Preempted: a SIGTERM came; the step it came in was saved.
  """
  if "://" in str(workdir):
    raise errors.ConfigError(
      f"--workdir {workdir}: a run writes to disks only, in this version. Give"
      " a directory that all hosts of the run can see (Filestore, NFS, a"
      " mounted bucket)."
    )
  workdir = pathlib.Path(workdir)
  _check_workdir(config, workdir)
  run = _Run(config, workdir, quiet)
  try:
    with run.stop_signal:
      return run.train(stop_at)
  finally:
    run.close()


def _check_workdir(config, workdir):
  """A workdir belongs to one config; only lengths and logging may change."""
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "config.json"
  ours = json.loads(config.to_json_best_effort())
  if path.exists():
    theirs = json.loads(path.read_text())
    if changed := _differences(_identity(theirs), _identity(ours)):
      raise errors.ConfigError(
        f"{workdir} holds a run with another config; it differs in"
        f" {', '.join(changed[:6])}. Use another --workdir, or the config"
        f" stored in {path}."
      )
  path.write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")


def _identity(config: dict) -> dict:
  loose = ("log", "checkpoint", "eval", "mesh")
  return {k: v for k, v in config.items() if k not in loose}


def _differences(a, b, prefix="") -> list[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    return [
      line
      for key in sorted(set(a) | set(b))
      for line in _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    ]
  return [] if a == b else [f"{prefix[:-1]} ({a!r} there, {b!r} here)"]


class _Run:
  """The live objects of one call of `train`."""

  def __init__(self, config, workdir, quiet):
    self.config, self.workdir, self.quiet = config, workdir, quiet
    self.stop_signal = distributed.StopSignal()
    self.phases = phases_of(config)
    self.objective = objectives.build(config)
    self.mesh = sharding.make_mesh(config.mesh.to_dict())
    self.checkpoints = checkpoints.RunCheckpoints(
      workdir / "checkpoints",
      keep=config.checkpoint.keep,
      best=self.objective.best_metric,
      best_mode=self.objective.best_mode,
    )
    self.writer = None
    self.hashes = None
    self.evaluated: dict[str, float] = {}

  def close(self):
    if self.writer:
      self.writer.close()
    if self.hashes:
      self.hashes.close()
    self.checkpoints.close()  # last: it may report a write that failed

  def train(self, stop_at):
    last = self.phases[-1].stop
    with sharding.use(self.mesh):
      state = self._first_state()
      self.frozen = jax.device_put(
        self.objective.frozen, sharding.replicated(self.mesh)
      )
      step = int(state.step)
      self._open_logs(step)
      end = last if stop_at is None else min(stop_at, last)
      for phase in self.phases:
        if phase.stop <= step and not step < phase.stop:
          continue
        if step >= end:
          break
        state = self._train_phase(phase, state, end)
        step = int(state.step)
      if step == last:
        if not self.evaluated:
          self.evaluated = self._evaluate(step, state)
        self._export(state)
    return self.evaluated

  def _first_state(self):
    init = state_lib.init_fn(self.objective, self.config.seed)
    boxed = jax.eval_shape(init)
    self.layout = state_lib.shardings(boxed, self.mesh)
    step = self.checkpoints.latest_step()
    if step is None:
      fresh = jax.jit(
        lambda: state_lib.unbox(init()), out_shardings=self.layout
      )
      return fresh()
    phase = next(p for p in self.phases if step <= p.stop)
    abstract = state_lib.unbox(boxed)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract,
      self.layout,
    )
    labels = self.objective.labels(phase, abstract.params)
    _, opt = self._optimizer(phase, boxed.params, labels)
    return self.checkpoints.restore(step, abstract.replace(opt_state=opt))

  def _optimizer(self, phase, boxed_params, labels):
    """The phase's optimizer and its abstract, sharded state."""
    tx = optimizer.make(self.config.optimizer, phase, labels)
    boxed = jax.eval_shape(
      lambda p: tx.init(optimizer.select(p, labels)), boxed_params
    )
    layout = sharding.param_shardings(boxed, self.mesh)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state_lib.unbox(boxed),
      layout,
    )
    return tx, abstract

  def _begin_phase(self, phase, state):
    """Fresh moments, and what the objective does between phases."""
    if int(state.step) != phase.start:
      return state
    params, extra = self.objective.begin_phase(
      phase, state, self.frozen, self._device_batch
    )
    params = jax.device_put(params, self.layout.params)
    extra = jax.device_put(extra, self.layout.extra)
    boxed = jax.eval_shape(
      state_lib.init_fn(self.objective, self.config.seed)
    ).params
    labels = self.objective.labels(phase, params)
    tx, abstract = self._optimizer(phase, boxed, labels)
    init = jax.jit(
      lambda p: tx.init(optimizer.select(p, labels)),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    return state.replace(params=params, extra=extra, opt_state=init(params))

  def _device_batch(self, index: int):
    """Global batch `index`, on the mesh (for what happens between steps)."""
    batch = next(self.objective.batches(index))
    return sharding.put_batch(batch, self.mesh)

  def _train_phase(self, phase, state, end):
    state = self._begin_phase(phase, state)
    labels = self.objective.labels(phase, state.params)
    tx = optimizer.make(self.config.optimizer, phase, labels)
    step_fn = jax.jit(
      state_lib.make_step(self.objective, phase, labels, tx),
      donate_argnums=0,
    )
    first = int(state.step)
    stop = min(phase.stop, end)
    batches = self.objective.batches(first)
    before = None  # the last step's metrics, read one step late
    window: list[dict[str, jax.Array]] = []
    with progress.Progress(
      phase.stop - phase.start,
      start=first - phase.start,
      label=f"{self.config.stage}/{phase.name}",
      stream=io.StringIO() if self.quiet else None,
    ) as bar:
      for step in range(first, stop):
        with bar.waiting():
          batch = next(batches)
        self._hash(step, batch)
        on_mesh = sharding.put_batch(batch, self.mesh)
        state, metrics = step_fn(state, self.frozen, on_mesh)
        window.append(metrics)
        if before is not None:
          self._check_finite(step - 1, before)
        before = metrics
        bar.update(
          step + 1 - phase.start,
          examples=self.objective.batch_examples,
          tokens=self.objective.count_tokens(batch),
          metrics={"loss": float(window[max(len(window) - 2, 0)]["loss"])},
        )
        if self._is_due(step + 1, stop):
          self._check_finite(step, metrics)
          with bar.paused():
            self._after_step(phase, step + 1, stop, state, window, bar)
        if self.stop_signal.after(step + 1):
          self._save_and_leave(step + 1, state)
    return state

  def _save_and_leave(self, step, state):
    """Saves and raises Preempted."""
    self._save(step, state, None)
    self.checkpoints.wait()
    raise errors.Preempted(
      f"Stage {self.config.stage!r} was asked to stop (SIGTERM); step {step} is"
      " saved. Give the same command again: it goes on from there."
    )

  def _is_due(self, step, stop):
    """Is anything logged, evaluated or saved after this step?"""
    config = self.config
    intervals = (config.log.every, config.eval.every, config.checkpoint.every)
    return step == stop or any(step % every == 0 for every in intervals)

  def _after_step(self, phase, step, stop, state, window, bar):
    config = self.config
    if window and (step % config.log.every == 0 or step == stop):
      self.writer.write_scalars(step, _means(window) | bar.rates())
      self.writer.flush()
      window.clear()
    metrics = None
    if step % config.eval.every == 0 or step == self.phases[-1].stop:
      metrics = self.evaluated = self._evaluate(step, state)
      shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
      bar.print(f"{config.stage} step {step}, held out: {shown}")
    if step % config.checkpoint.every == 0 or step == stop:
      self._save(step, state, metrics)

  def _evaluate(self, step, state):
    metrics = self.objective.evaluate(state.params, self.frozen, state.extra)
    metrics = {name: float(value) for name, value in metrics.items()}
    self.writer.write_scalars(
      step, {f"held_out/{name}": value for name, value in metrics.items()}
    )
    if self.objective.pictures is not None and len(self.objective.pictures):
      self._show(step, self.objective.pictures)
    self.writer.flush()
    return metrics

  def _show(self, step, pictures):
    """Pictures uint8[B, h, w, 3] as events, and in a row as a file."""
    self.writer.write_images(step, {"held_out/pictures": pictures})
    if jax.process_index() == 0:
      path = self.workdir / "pictures" / f"{step:06d}.png"
      path.parent.mkdir(exist_ok=True)
      images.to_pil(np.concatenate(list(pictures), axis=1)).save(path)

  def _save(self, step, state, metrics):
    meta = {
      "config": json.loads(self.config.to_json_best_effort()),
      "data": {"next_batch": step},
      "stage": self.config.stage,
    }
    self.checkpoints.save(step, state, meta, metrics)

  def _check_finite(self, step, metrics):
    if not np.isfinite(float(metrics["loss"])):
      saved = self.checkpoints.latest_step()
      raise errors.LavitError(
        f"The loss of stage {self.config.stage!r} is {metrics['loss']} at step"
        f" {step}. Nothing after the checkpoint of step {saved} was kept."
        " Lower the learning rate of this phase (config.phases), or look at"
        f" the batch: {self.workdir / 'batches.jsonl'} names its hash."
      )

  def _hash(self, step, batch):
    """One line a step: crc32 over every array, so that runs can be compared."""
    value = 0
    for name in sorted(batch):
      array = np.ascontiguousarray(batch[name])
      value = zlib.crc32(array.view(np.uint8).reshape(-1), value)
    self.hashes.write_scalars(step, {"crc32": value})

  def _open_logs(self, step):
    self.writer = writers.create(self.workdir, resume_step=step)
    # Batch s leads from step s to step s + 1.
    self.hashes = writers.JsonLinesWriter(
      self.workdir / "batches.jsonl", resume_step=step - 1
    )

  def _export(self, state):
    made = self.objective.exports(state.params, state.extra)
    for part, (params, meta) in made.items():
      meta = {
        **meta,
        "config": json.loads(self.config.to_json_best_effort()),
        "metrics": self.evaluated,
        "step": int(state.step),
        "parameters": checkpoints.count_params(params),
      }
      checkpoints.save_part(self.config.model_dir, part, params, meta)


def _means(window) -> dict[str, float]:
  """Means of the metrics of several steps."""
  return {
    name: float(
      clu.metrics.Average.from_model_output(
        jnp.stack([metrics[name] for metrics in window])
      ).compute()
    )
    for name in window[0]
  }
