"""One training loop for every stage.

Order of one step: take the batch, hash it, put it on the mesh, update, log,
evaluate, save. The data position moves only with the step that used it, so a
checkpoint at step s resumes with the batch after its last.

With several processes each runs this loop, in step with the others: it reads
its share of each batch, and the first one writes logs and images.
"""

import io
import json
import logging

import jax
import numpy as np

from lavit_jax.core import (
  averages,
  closing,
  errors,
  hosts,
  image_io,
  progress,
  sharding,
)
from lavit_jax.core.storage import checkpoints
from lavit_jax.cost import chips
from lavit_jax.train import boundaries, lowering, objectives, optimizer, ranges
from lavit_jax.train import phases as phases_lib
from lavit_jax.train import step as step_lib
from lavit_jax.train.resilience import (
  data_position,
  distributed,
  nonfinite,
  provenance,
  run_checkpoints,
)
from lavit_jax.train.resilience import workdir as workdir_lib
from lavit_jax.train.telemetry import batch_log, meter, tracing, writers

_LOG = logging.getLogger(__name__)


def train(
  config, workdir, *, stop_at: int | None = None, quiet: bool = False
) -> dict[str, float]:
  """Trains one stage to the end, from its newest checkpoint if it has one.

  Args:
    config: an `ml_collections.ConfigDict`; see `configs/tiny`.
    workdir: checkpoints, logs and events go here; a path that all processes
      of the run see, gs://BUCKET/FOLDER too.
    stop_at: stop after this step as if interrupted (the state is saved).
    quiet: no progress bar.

  Returns:
    The last held-out metrics. When the last phase is over, the stage's part
    has been written to `config.model_dir`.

  Raises:
    errors.ConfigError: fields that do not fit, or a workdir of another run.
    errors.LavitError: the loss is not finite (the message names the step),
      and config.nonfinite has no way out.
    errors.Preempted: a SIGTERM came; the step it came in was saved.
    errors.PeerLost: another process of the run has died.
  """
  with distributed.failing_together():
    ranges.check(config)
    workdir = workdir_lib.check(config, workdir)
    run = _Run(config, workdir, quiet or not hosts.is_lead())
    try:
      workdir_lib.claim(config, workdir)
      with run.stop_signal:
        metrics = run.train(stop_at)
    except BaseException as error:
      if distributed.is_lost_peer(error):
        run.forget()
      closing.after(error, run.close)
      raise
    run.close()
    return metrics


class _Run:
  """The live objects of one call of `train`."""

  def __init__(self, config, workdir, quiet):
    self.config, self.workdir, self.quiet = config, workdir, quiet
    self.stop_signal = distributed.StopSignal()
    self.phases = phases_lib.phases_of(config)
    self.mesh = sharding.make_mesh(config.mesh.to_dict())
    step_lib.check_accumulation(config, self.mesh)
    self.objective = objectives.build(config)
    self.rows = sharding.rows_of_process(self.mesh, config.batch_size)
    self.checkpoints = run_checkpoints.RunCheckpoints(
      workdir / "checkpoints",
      keep=config.checkpoint.keep,
      best=self.objective.best_metric,
      best_mode=self.objective.best_mode,
    )
    self.watch = nonfinite.Watch(nonfinite.policy_of(config), config.stage)
    self.position = data_position.Position(config.batch_size)
    self.state = None
    self.writer = None
    self.hashes = None
    self.meter = None
    self.tracer = tracing.Tracer(config, workdir)
    self.evaluated: dict[str, float] = {}

  def close(self):
    calls = [self.tracer.close, self._close_logs]
    if self.checkpoints:
      calls.append(self.checkpoints.close)  # last: it waits for what is saved
    closing.each(calls)

  def forget(self):
    """Leaves pending saves as they are: they cannot become complete."""
    self.checkpoints = None

  def _close_logs(self):
    logs = (self.meter, self.writer, self.hashes)
    closing.each(log.close for log in logs if log)

  def train(self, stop_at):
    last = self.phases[-1].stop
    self.made_of = provenance.of(self.objective)
    with sharding.use(self.mesh):
      self.state = self._first_state()
      self.frozen = self.objective.load_frozen(
        sharding.param_shardings(self.objective.frozen_shapes(), self.mesh)
      )
      step = int(self.state.step)
      self._open_logs(step)
      end = last if stop_at is None else min(stop_at, last)
      while step < end:
        phase, bad = next(p for p in self.phases if step < p.stop), None
        try:
          self.state = self._train_phase(phase, end)
        except nonfinite.RollBack as found:
          bad = found.step  # and its frames let their arrays go
        if bad is not None:
          self.state = self._roll_back(bad)
        step = int(self.state.step)
      if step == last:
        if not self.evaluated:
          self.evaluated = self._evaluate(step, self.state)
        nonfinite.check_result(self.config, self.workdir, step, self.evaluated)
        self._export(self.state)
    return self.evaluated

  def _first_state(self):
    """That of the newest checkpoint which can be read; a fresh one if none."""
    init = step_lib.init_fn(self.objective, self.config.seed)
    boxed = jax.eval_shape(init)
    abstract = sharding.abstract(boxed, self.mesh)
    self.layout = sharding.layout_of(abstract)

    def abstract_at(step):
      phase = next((p for p in self.phases if step <= p.stop), self.phases[-1])
      labels = self.objective.labels(phase, abstract.params)
      tx = optimizer.make(self.config.optimizer, phase, labels, boxed.params)
      opt = lowering.optimizer_state(tx, boxed.params, labels, self.mesh)
      return abstract.replace(opt_state=opt)

    found = self.checkpoints.restore_newest(abstract_at)
    if found is None:
      workdir_lib.say_replaced(self.config, self.objective.part)
      fresh = jax.jit(lambda: sharding.unbox(init()), out_shardings=self.layout)
      return fresh()
    provenance.check(found, self.made_of, self.config)
    self.position = data_position.resume(
      found.meta,
      found.step,
      self.config.batch_size,
      self.objective.batch_size_may_change,
    )
    return found.state

  def _roll_back(self, bad):
    """The newest checkpoint's state; the batches up to step `bad` are over."""
    self.checkpoints.wait()
    skipped = self.position.example(bad + 1)
    state = self._first_state()
    step = int(state.step)
    self.watch.rolled_back(bad, step or None)
    size = self.config.batch_size
    self.position = data_position.Position(size, skipped - step * size)
    self._close_logs()
    self._open_logs(step)
    if hosts.is_lead():
      _LOG.warning(
        "stage %r was not finite at step %d: back to step %d, and on with the"
        " batch after it",
        self.config.stage,
        bad,
        step,
      )
    return state

  def _begin_phase(self, phase, state):
    """Fresh moments, and what the objective does between phases."""
    if int(state.step) != phase.start:
      return state
    return boundaries.begin(
      self.objective, phase, state, self.frozen, self._device_batch, self.mesh
    )

  def _boxed(self):
    """The parameters' shapes with their logical axes."""
    init = step_lib.init_fn(self.objective, self.config.seed)
    return jax.eval_shape(init).params

  def _device_batch(self, index: int):
    """Global batch `index`, on the mesh (for what happens between steps)."""
    batches = self.objective.batches(index, self.position.skip, self.rows)
    return self._put(next(batches))

  def _put(self, batch):
    """A global batch, of what this process has read of it."""
    return sharding.put_batch(batch, self.mesh, self.config.batch_size)

  def _train_phase(self, phase, end):
    # The phase and its steps delete what they replace of the state.
    state, self.state = self.state, None
    state = self._begin_phase(phase, state)
    labels = self.objective.labels(phase, state.params)
    tx = optimizer.make(self.config.optimizer, phase, labels, self._boxed())
    step_fn = step_lib.jit_step(
      self.objective, phase, labels, tx, self.mesh, sharding.layout_of(state)
    )
    first = int(state.step)
    stop = min(phase.stop, end)
    self.meter.begin_phase(self.objective, phase)
    batches = self.objective.batches(first, self.position.skip, self.rows)
    before = None  # the last step's metrics, read one step late
    window: list[averages.Metrics] = []
    with progress.Progress(
      phase.stop - phase.start,
      start=first - phase.start,
      label=f"{self.config.stage}/{phase.name}",
      stream=io.StringIO() if self.quiet else None,
    ) as bar:
      for step in range(first, stop):
        self.meter.enter("data_wait")
        with bar.waiting():
          batch = next(batches)
        self.meter.enter("compile" if step == first else "step")
        self.tracer.before(step)
        self._hash(step, batch)
        on_mesh = self._put(batch)
        if step == first:
          bar.compiling()
        state, metrics = step_fn(state, self.frozen, on_mesh)
        self.meter.enter("step")
        self.tracer.after(step, metrics)
        window.append(metrics)
        shown = {}
        if before is not None:
          self.watch.check(step - 1, _watched(before))
          shown = {"loss": averages.value(before["loss"])}
        before = metrics
        tokens = self.objective.count_tokens(batch)
        self.meter.count(batch, tokens)
        bar.update(
          step + 1 - phase.start,
          examples=self.objective.batch_examples,
          tokens=tokens,
          metrics=shown,
        )
        if self._is_due(step + 1, stop):
          self.watch.check(step, _watched(metrics))
          with bar.paused():
            self._after_step(step + 1, stop, state, window, bar)
        if self.stop_signal.after(step + 1):
          self.watch.check(step, _watched(metrics))
          self._save_and_leave(step + 1, state, window, bar)
        self.checkpoints.seal()
    self.meter.enter("start")
    return state

  def _save_and_leave(self, step, state, window, bar):
    """Saves and raises Preempted."""
    self._log(step, window, bar)
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

  def _after_step(self, step, stop, state, window, bar):
    config, metrics = self.config, None
    saves = step % config.checkpoint.every == 0 or step == stop
    if saves or step % config.log.every == 0:
      self._log(step, window, bar)
    if step % config.eval.every == 0 or step == self.phases[-1].stop:
      self.meter.enter("evaluation")
      metrics = self.evaluated = self._evaluate(step, state)
      shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
      bar.print(f"{config.stage} step {step}, held out: {shown}")
    if saves:
      self._save(step, state, metrics)

  def _log(self, step, window, bar):
    """A row of the steps since the last one.

    Before every checkpoint, so that none is lost to a run that goes on there.
    """
    if not window:
      return
    found = averages.merged(window, finite=True)
    found |= bar.rates() | self.meter.rates()
    self.writer.write_scalars(step, found)
    self.writer.flush()
    window.clear()

  def _evaluate(self, step, state):
    metrics = self.objective.evaluate(
      state.params, self.frozen, state.extra, self.mesh
    )
    metrics = {name: float(value) for name, value in metrics.items()}
    self.writer.write_scalars(
      step, {f"held_out/{name}": value for name, value in metrics.items()}
    )
    if self.objective.images is not None and len(self.objective.images):
      self._show(step, self.objective.images)
    self.writer.flush()
    return metrics

  def _show(self, step, images):
    """Images uint8[B, h, w, 3] as events, and in a row as a file."""
    self.writer.write_images(step, {"held_out/pictures": images})
    if hosts.is_lead():
      path = self.workdir / "pictures" / f"{step:06d}.png"
      path.parent.mkdir(exist_ok=True)
      file = io.BytesIO()
      row = np.concatenate(list(images), axis=1)
      image_io.to_pil(row).save(file, format="PNG")
      path.write_bytes(file.getvalue())

  def _save(self, step, state, metrics):
    meta = {
      "config": json.loads(self.config.to_json_best_effort()),
      "data": self.position.meta(step),
      "made_of": self.made_of,
      "stage": self.config.stage,
    }
    self.meter.enter("checkpoint")
    self.hashes.flush()
    self.checkpoints.save(step, state, meta, metrics)
    self.meter.saved(step)

  def _hash(self, step, batch):
    """One line a step, so that runs can be compared."""
    self.hashes.add(step, batch, self.position.example(step))

  def _open_logs(self, step):
    self.writer = (
      writers.create(self.workdir, resume_step=step)
      if hosts.is_lead()
      else writers.MultiWriter([])
    )
    self.meter = meter.Meter(
      self.workdir,
      resume_step=step,
      chip=chips.of_device(self.mesh.devices.flat[0]),
      num_devices=self.mesh.size,
      num_shares=self.config.batch_size // len(self.rows),
      write=hosts.is_lead(),
    )
    # Batch s leads from step s to step s + 1.
    self.hashes = batch_log.BatchLog(
      self.workdir / "batches.jsonl",
      self.mesh,
      self.config.batch_size,
      resume_step=step - 1,
    )

  def _export(self, state):
    made = self.objective.exports(state.params, state.extra)
    for part, (params, meta) in made.items():
      meta = {
        **meta,
        "config": json.loads(self.config.to_json_best_effort()),
        "made_of": self.made_of,
        "metrics": self.evaluated,
        "step": int(state.step),
        "parameters": checkpoints.count_params(params),
      }
      checkpoints.save_part(self.config.model_dir, part, params, meta)


def _watched(metrics) -> dict[str, jax.Array]:
  """What `nonfinite` judges: sums, finite if what they are of is."""
  return {name: metrics[name].total for name in ("loss", "grad_norm")}
