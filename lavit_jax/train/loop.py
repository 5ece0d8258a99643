"""One training loop for every stage.

Order of one step: take the batch, log its hash, put it on the mesh, update,
log, evaluate, save. The data position moves only with the step that used the
batch, so a checkpoint at step s resumes with the batch after its last.

With several processes each runs this loop, in step with the others: it reads
its share of each batch, and the lead process writes logs and images.
"""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from lavit_jax.core import (
  averages,
  closing,
  errors,
  hosts,
  progress,
  sharding,
)
from lavit_jax.core.storage import checkpoints
from lavit_jax.train import boundaries, lowering, objectives, optimizer, ranges
from lavit_jax.train import phases as phases_lib
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import evaluation
from lavit_jax.train.resilience import (
  data_position,
  distributed,
  nonfinite,
  provenance,
  run_checkpoints,
)
from lavit_jax.train.resilience import workdir as workdir_lib
from lavit_jax.train.telemetry import run_log

_LOG = logging.getLogger(__name__)


def train(
  config: ml_collections.ConfigDict,
  workdir: str | epath.Path,
  *,
  stop_at: int | None = None,
  quiet: bool = False,
) -> dict[str, float]:
  """Trains one stage to the end, from its newest checkpoint if it has one.

  Args:
    config: of the run; see `configs/tiny`.
    workdir: folder of checkpoints, logs and events that all processes of the
      run see; gs://BUCKET/FOLDER too.
    stop_at: stop after this step as if interrupted (the state is saved).
    quiet: no progress bar.

  Returns:
    The last held-out metrics. After the last phase the stage's part has been
    written to `config.model_dir`.

  Raises:
    errors.ConfigError: fields do not fit, or the workdir is of another run.
    errors.LavitError: the loss is not finite (the message names the step), and
      config.nonfinite does not allow to go on.
    errors.Preempted: a SIGTERM came; the step it came in was saved.
    errors.PeerLost: another process of the run has died.
  """
  with distributed.failing_together():
    ranges.check(config)
    folder = workdir_lib.check(config, workdir)
    run = _Run(config, folder, quiet or not hosts.is_lead())
    try:
      workdir_lib.claim(config, folder)
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

  state: Any  # a TrainState; None while a phase replaces it
  frozen: Any
  layout: Any  # shardings of the state, without those of the optimizer
  provenance: dict[str, str]

  def __init__(self, config, workdir: epath.Path, quiet: bool):
    self.config, self.workdir, self.quiet = config, workdir, quiet
    self.stop_signal = distributed.StopSignal()
    self.phases = phases_lib.phases_of(config)
    # A policy that there is not is refused before anything is written.
    self.watch = nonfinite.Watch(nonfinite.policy_of(config), config.stage)
    self.mesh = sharding.make_mesh(config.mesh.to_dict())
    step_lib.check_accumulation(config, self.mesh)
    self.objective = objectives.build(config)
    self.evaluator = evaluation.Evaluator(self.objective, self.mesh)
    self.rows = sharding.rows_of_process(self.mesh, config.batch_size)
    self.checkpoints = run_checkpoints.RunCheckpoints(
      workdir / "checkpoints",
      keep=config.checkpoint.keep,
      best=self.objective.best_metric,
      best_mode=self.objective.best_mode,
    )
    self.awaits_saves = True
    self.position = data_position.Position(config.batch_size)
    self.logs = run_log.RunLog(config, workdir, self.mesh)
    self.evaluated: dict[str, float] = {}

  def close(self) -> None:
    """Closes logs and checkpoints, whatever one of them meets."""
    calls = [self.logs.close]
    if self.awaits_saves:
      calls.append(self.checkpoints.close)  # last: it waits for pending saves
    closing.each(calls)

  def forget(self) -> None:
    """Leaves pending saves as they are: they cannot become complete."""
    self.awaits_saves = False

  def train(self, stop_at: int | None) -> dict[str, float]:
    """Runs the phases; returns the last held-out metrics."""
    last = self.phases[-1].stop
    self.provenance = provenance.of(self.objective)
    with sharding.use(self.mesh):
      self.state = self._first_state()
      self.frozen = self.objective.load_frozen(
        sharding.param_shardings(self.objective.frozen_shapes(), self.mesh)
      )
      step = int(self.state.step)
      self.logs.open(step)
      end = last if stop_at is None else min(stop_at, last)
      while step < end:
        phase, bad_step = next(p for p in self.phases if step < p.stop), None
        try:
          self.state = self._train_phase(phase, end)
        except nonfinite.RollBack as roll_back:
          bad_step = roll_back.step
        if bad_step is not None:  # the frames of the error are gone by now
          self.state = self._roll_back(bad_step)
        step = int(self.state.step)
      if step == last:
        if not self.evaluated:
          self.evaluated = self._evaluate(step, self.state)
        nonfinite.check_result(self.config, self.workdir, step, self.evaluated)
        self._export(self.state)
    return self.evaluated

  # The state: fresh, restored, rolled back.

  def _first_state(self) -> step_lib.TrainState:
    """Restores the newest readable checkpoint, or makes a fresh state."""
    boxed = step_lib.abstract_state(self.objective)
    abstract = sharding.abstract(boxed, self.mesh)
    self.layout = sharding.layout_of(abstract)

    def abstract_at(step):
      phase = next((p for p in self.phases if step <= p.stop), self.phases[-1])
      labels = self.objective.labels(phase, abstract.params)
      tx = optimizer.make(self.config.optimizer, phase, labels, boxed.params)
      opt = lowering.optimizer_state(tx, boxed.params, labels, self.mesh)
      return abstract.replace(opt_state=opt)

    restored = self.checkpoints.restore_newest(abstract_at)
    if restored is None:
      workdir_lib.warn_of_replaced_part(self.config, self.objective.part)
      seed = self.config.seed
      return step_lib.jit_init(self.objective, seed, self.layout)()
    provenance.check(restored, self.provenance, self.config)
    self.position = data_position.resume(
      restored.meta,
      restored.step,
      self.config.batch_size,
      self.objective.batch_size_may_change,
    )
    self.objective.check_data(restored.meta["data"])
    return restored.state

  def _roll_back(self, bad_step: int) -> step_lib.TrainState:
    """Restores the newest checkpoint and skips the batches up to `bad_step`."""
    self.checkpoints.wait()
    next_example = self.position.example(bad_step + 1)
    state = self._first_state()
    step, size = int(state.step), self.config.batch_size
    self.watch.rolled_back(bad_step, step or None)
    self.position = data_position.Position(size, next_example - step * size)
    self.logs.open(step)
    if hosts.is_lead():
      _LOG.warning(
        "stage %r was not finite at step %d: it goes back to step %d, and on"
        " with the batch after the bad one",
        self.config.stage,
        bad_step,
        step,
      )
    return state

  # The steps.

  def _train_phase(self, phase: phases_lib.Phase, end: int):
    """Runs the steps of a phase up to `end`; returns the state after them."""
    # The phase and its steps delete the arrays that they replace.
    state, self.state = self.state, None
    if int(state.step) == phase.start:
      state = boundaries.begin(
        self.objective, phase, state, self.frozen, self._batch_at, self.mesh
      )
    step_fn = self._jit_step(phase, state)
    first, stop = int(state.step), min(phase.stop, end)
    self.logs.meter.begin_phase(self.objective, phase)
    batches = self.objective.batches(first, self.position.skip, self.rows)
    previous = None  # metrics are read one step late, so that nothing waits
    window: list[averages.Metrics] = []  # metrics since the last row of the log
    with self._progress_bar(phase, first) as bar:
      for step in range(first, stop):
        batch, on_mesh = self._next_batch(step, batches, bar, step == first)
        state, metrics = step_fn(state, self.frozen, on_mesh)
        self.logs.meter.enter("step")
        self.logs.tracer.after(step, metrics)
        window.append(metrics)
        shown: dict[str, float] = {}
        if previous is not None:
          shown = self._check_finite(step - 1, previous)
        previous = metrics
        self._count(step + 1 - phase.start, batch, shown, bar)
        if self._is_due(step + 1, stop):
          self._check_finite(step, metrics)
          with bar.paused():
            self._after_step(step + 1, stop, state, window, bar)
        if self.stop_signal.after(step + 1):
          self._check_finite(step, metrics)
          self._save_and_leave(step + 1, state, window, bar)
        self.checkpoints.seal()
    self.logs.meter.enter("start")
    return state

  def _jit_step(self, phase: phases_lib.Phase, state: step_lib.TrainState):
    """Returns the jitted step of a phase."""
    labels = self.objective.labels(phase, state.params)
    boxed, _ = self.objective.init_shapes
    tx = optimizer.make(self.config.optimizer, phase, labels, boxed)
    layout = sharding.layout_of(state)
    return step_lib.jit_step(
      self.objective, phase, labels, tx, self.mesh, layout
    )

  def _progress_bar(self, phase: phases_lib.Phase, first: int):
    """Returns the progress bar of a phase that goes on from step `first`."""
    return progress.Progress(
      phase.steps,
      start=first - phase.start,
      label=f"{self.config.stage}/{phase.name}",
      stream=io.StringIO() if self.quiet else None,
    )

  def _next_batch(
    self,
    step: int,
    batches: Iterator[dict[str, np.ndarray]],
    bar: progress.Progress,
    is_first: bool,
  ) -> tuple[dict[str, np.ndarray], Any]:
    """Takes the batch of a step: (this process's rows, the batch on the mesh).

    The first step of a phase compiles: its time is noted as such.
    """
    self.logs.meter.enter("data_wait")
    with bar.waiting():
      batch = next(batches)
    self.logs.meter.enter("compile" if is_first else "step")
    self.logs.tracer.before(step)
    self.logs.batches.add(step, batch, self.position.example(step))
    on_mesh = self._put(batch)
    if is_first:
      bar.compiling()
    return batch, on_mesh

  def _batch_at(self, index: int):
    """Returns global batch `index` on the mesh, for `boundaries.begin`."""
    batches = self.objective.batches(index, self.position.skip, self.rows)
    return self._put(next(batches))

  def _put(self, batch: dict[str, np.ndarray]):
    """Makes a global batch of the rows that this process has read."""
    return sharding.put_batch(batch, self.mesh, self.config.batch_size)

  def _check_finite(
    self, step: int, metrics: averages.Metrics
  ) -> dict[str, float]:
    """Reads a step's metrics; returns those that the progress bar shows.

    Sums are read: they are finite if what they add up is.
    """
    names = ("loss", "grad_norm")
    self.watch.check(step, {name: metrics[name].total for name in names})
    return {"loss": averages.value(metrics["loss"])}

  def _count(self, done: int, batch, shown, bar: progress.Progress) -> None:
    """Counts a step of the phase, by its batch, for rates and progress."""
    tokens = self.objective.count_tokens(batch)
    self.logs.meter.count(batch, tokens)
    bar.update(
      done, examples=self.config.batch_size, tokens=tokens, metrics=shown
    )

  # After a step: log, evaluate, save.

  def _is_due(self, step: int, stop: int) -> bool:
    """Returns whether something is logged, evaluated or saved at a step."""
    config = self.config
    intervals = (config.log.every, config.eval.every, config.checkpoint.every)
    return step == stop or any(step % every == 0 for every in intervals)

  def _after_step(self, step: int, stop: int, state, window, bar) -> None:
    """Logs, evaluates and saves what is due at a step."""
    config, metrics = self.config, None
    saves = step % config.checkpoint.every == 0 or step == stop
    if saves or step % config.log.every == 0:
      self._log_steps(step, window, bar)
    if step % config.eval.every == 0 or step == self.phases[-1].stop:
      self.logs.meter.enter("evaluation")
      metrics = self.evaluated = self._evaluate(step, state)
      shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
      bar.print(f"{config.stage} step {step}, held out: {shown}")
    if saves:
      self._save(step, state, metrics)

  def _log_steps(self, step: int, window, bar: progress.Progress) -> None:
    """Writes a row of the steps since the last one, and empties the window.

    Before every checkpoint, so that no step is missing from the log of a run
    that goes on from there.
    """
    if window:
      data = self.objective.data_progress(self.position.example(step))
      self.logs.write_steps(step, window, bar.rates() | data)
      window.clear()

  def _evaluate(self, step: int, state) -> dict[str, float]:
    """Evaluates on held-out batches and logs the result."""
    result = self.evaluator.evaluate(state.params, self.frozen, state.extra)
    metrics = {name: float(value) for name, value in result.metrics.items()}
    self.logs.write_evaluation(step, metrics, result.images)
    return metrics

  def _save(self, step: int, state, metrics: dict[str, float] | None) -> None:
    """Starts to save a checkpoint."""
    meta = {
      "config": json.loads(self.config.to_json_best_effort()),
      "data": self.position.meta(step)
      | self.objective.data_meta(self.position.example(step)),
      "made_of": self.provenance,
      "stage": self.config.stage,
    }
    self.logs.meter.enter("checkpoint")
    self.logs.batches.flush()
    self.checkpoints.save(step, state, meta, metrics)
    self.logs.meter.saved(step)

  def _save_and_leave(self, step: int, state, window, bar) -> None:
    """Saves a checkpoint, waits for it and raises Preempted."""
    self._log_steps(step, window, bar)
    self._save(step, state, None)
    self.checkpoints.wait()
    raise errors.Preempted(
      f"Stage {self.config.stage!r} was asked to stop (SIGTERM); step {step} is"
      " saved. Give the same command again: it goes on from there."
    )

  def _export(self, state: step_lib.TrainState) -> None:
    """Writes the stage's parts to config.model_dir."""
    parts = self.objective.export(state.params, state.extra)
    for part, (params, meta) in parts.items():
      meta = {
        **meta,
        "config": json.loads(self.config.to_json_best_effort()),
        "made_of": self.provenance,
        "metrics": self.evaluated,
        "step": int(state.step),
        "parameters": checkpoints.count_params(params),
      }
      checkpoints.save_part(self.config.model_dir, part, params, meta)
