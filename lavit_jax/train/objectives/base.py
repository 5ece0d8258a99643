"""The contract between a stage and the training loop.

An `Objective` says what a stage learns, from which batches, and how it is
judged. `train/step.py` makes the train step of it, `train/boundaries.py` the
programs before a phase, `objectives/evaluation.py` the held-out evaluation.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lavit_jax.core import averages, sharding
from lavit_jax.data import contents
from lavit_jax.data.batching import pipeline
from lavit_jax.train import optimizer
from lavit_jax.train import phases as phases_lib
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib
from lavit_jax.train.objectives.frozen import branches as branches_lib

Params: TypeAlias = Any  # nested dicts of trainable arrays
Frozen: TypeAlias = Any  # {network: its parameters}, never differentiated
Extra: TypeAlias = Any  # {name: tree} that changes without a gradient
Batch: TypeAlias = Mapping[str, jax.Array]  # arrays [B, ...]
Draws: TypeAlias = Mapping[str, jax.Array]  # random arrays [B, ...]
Sums: TypeAlias = dict[str, jax.Array]  # float32[] each, added up over rows
Stats: TypeAlias = Any  # tree that `update_extra` takes, added up over rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
  """Computes entries of `TrainState.extra` from batches, one after another.

  All functions are pure. The optimizer state of the train state that they take
  is None.

  Attributes:
    name: for reports, such as "kmeans".
    batches: number of batches, from the phase's first on.
    start: () -> initial carry, boxed as parameters are.
    add: (carry, batch number int32[], state, frozen, batch) -> carry.
    finish: (carry, state) -> new values of some entries of `state.extra`.
  """

  name: str
  batches: int
  start: Callable[[], Any]
  add: Callable[..., Any]
  finish: Callable[..., dict[str, Any]]


class Objective(abc.ABC):
  """A stage of training.

  Methods that take `params` are pure functions of their arguments. The loss of
  a batch is `combine(sums)`, where `sums` adds up over rows: so a batch can be
  run in parts (see `train/step.py`). An objective holds no weights. Built from
  `AbstractArtifacts` it has no data either, only shapes: enough to compile its
  step.

  Attributes:
    config: of the run.
    artifacts: where data and weights of earlier stages are found.
    source: the training examples; None with `AbstractArtifacts`.
    held_out: the held-out examples; None with `AbstractArtifacts`.
    last_phase: whose settings judge held-out batches.
    part: the model directory's part that the stage writes.
    best_metric: held-out metric that the best checkpoint is chosen by.
    best_mode: "min" or "max".
    batch_size_may_change: whether rows do not depend on the size of their
      batch, so that a run can go on with another size.
  """

  part: str
  best_metric: str = "loss"
  best_mode: str = "min"
  batch_size_may_change: bool = True
  _train_data: Any = None  # Grain datasets of batches, made by the stage
  _held_out_data: Any = None

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    self.config = config
    self.artifacts = artifacts or artifacts_lib.Artifacts()
    self.source, self.held_out = self.artifacts.sources(config)
    self.last_phase = phases_lib.last_phase(config)

  # Parameters: what is trained, and where it starts.

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> tuple[Params, Extra]:
    """Draws the first parameters.

    Args:
      rng: a key.

    Returns:
      (params, extra), boxed with their logical axes.
    """

  @functools.cached_property
  def init_shapes(self) -> tuple[Params, Extra]:
    """Returns the shapes of what `init` draws, boxed; traced once a run."""
    # A key is made in the trace: the mesh may be of devices that cannot run.
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def labels(self, phase: phases_lib.Phase, params: Params) -> Any:
    """Returns the learning-rate group of each parameter; a tree of names.

    By default that of `optimizer.labels_of`: by the prefixes in `phase.train`.
    """
    return optimizer.labels_of(phase, params)

  def begin_phase(
    self, phase: phases_lib.Phase, state: Any
  ) -> tuple[Params, Extra]:
    """Reads what a phase starts from; by default it goes on from the state.

    Args:
      phase: that begins.
      state: the run's `TrainState`, without optimizer state.

    Returns:
      (params, extra) of the phase's start. `folds` are computed after it.
    """
    del phase
    return state.params, state.extra

  def folds(self, phase: phases_lib.Phase) -> tuple[Fold, ...]:
    """Returns what is computed from batches before a phase; by default none."""
    del phase
    return ()

  # Frozen networks: arguments of the step that are never differentiated.

  def frozen_shapes(self) -> Frozen:
    """Returns the frozen networks, abstract and boxed; by default none."""
    return {}

  def frozen_branches(self) -> dict[str, branches_lib.Branch]:
    """Returns where each frozen network is stored; by default none."""
    return {}

  def load_frozen(self, layout: Any = None) -> Frozen:
    """Reads the frozen networks, each array straight to its devices.

    Args:
      layout: shardings, a tree like `frozen_shapes`; None for one device.

    Returns:
      A tree like `frozen_shapes`, unboxed; abstract with `AbstractArtifacts`.

    Raises:
      errors.CheckpointError: a stored network is damaged or does not fit.
    """
    shapes = sharding.unbox(self.frozen_shapes())
    return self.artifacts.load(self.frozen_branches(), shapes, layout)

  # The loss.

  def draws(
    self, phase: phases_lib.Phase, batch: Batch, rng: jax.Array
  ) -> Draws:
    """Draws the random numbers of a whole batch, before it is cut into parts.

    The loss then does not depend on config.accumulate. By default none.

    Args:
      phase: of the run.
      batch: the whole batch.
      rng: the key of the step.

    Returns:
      {name: [B, ...]}, cut into parts as the rows of the batch are.
    """
    del phase, batch, rng
    return {}

  @abc.abstractmethod
  def nonlinear_sums(
    self,
    phase: phases_lib.Phase,
    params: Params,
    frozen: Frozen,
    extra: Extra,
    batch: Batch,
    draws: Draws,
  ) -> Sums:
    """Sums the terms in which `combine` is not linear, such as counts.

    A batch in parts needs them of all parts before the first gradient: the
    slope of the loss by each sum depends on them alone. No gradient passes.

    Args:
      phase: of the run.
      params: of the stage.
      frozen: see `load_frozen`.
      extra: of the train state.
      batch: some rows.
      draws: of these rows.

    Returns:
      Some entries of what `sums` returns.
    """

  @abc.abstractmethod
  def sums(
    self,
    phase: phases_lib.Phase,
    params: Params,
    frozen: Frozen,
    extra: Extra,
    batch: Batch,
    draws: Draws,
  ) -> tuple[Sums, Stats]:
    """Runs the networks and sums the loss's terms over rows.

    Args:
      phase: of the run.
      params: of the stage; the result is differentiated by them.
      frozen: see `load_frozen`.
      extra: of the train state.
      batch: some rows.
      draws: of these rows.

    Returns:
      (sums, stats): what `combine` and what `update_extra` take.
    """

  @abc.abstractmethod
  def combine(
    self, phase: phases_lib.Phase, sums: Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Combines the sums of a whole batch into its loss.

    Args:
      phase: of the run.
      sums: of all rows.

    Returns:
      (loss float32[], metrics, "loss" among them).
    """

  def merge_stats(self, a: Stats, b: Stats) -> Stats:
    """Merges the statistics of two parts of a batch; by default adds them.

    A tree of zeros is that of no rows.
    """
    return jax.tree.map(jnp.add, a, b)

  def update_extra(
    self, phase: phases_lib.Phase, extra: Extra, stats: Stats, params: Params
  ) -> tuple[Extra, averages.Metrics]:
    """Updates what changes without a gradient, once a step.

    Args:
      phase: of the run.
      extra: of the train state.
      stats: of the whole batch.
      params: after the optimizer's update.

    Returns:
      (new extra, metrics of the update); by default nothing changes.
    """
    del phase, stats, params
    return extra, {}

  def loss(
    self,
    phase: phases_lib.Phase,
    params: Params,
    frozen: Frozen,
    extra: Extra,
    batch: Batch,
    rng: jax.Array,
  ) -> tuple[jax.Array, tuple[Extra, averages.Metrics]]:
    """Computes (loss, (new extra, metrics)) of a whole batch at once.

    Arguments are those of `sums`, and the key of the step. `update_extra` takes
    the parameters as they are.
    """
    draws = self.draws(phase, batch, rng)
    sums, stats = self.sums(phase, params, frozen, extra, batch, draws)
    loss, metrics = self.combine(phase, sums)
    extra, more = self.update_extra(phase, extra, stats, params)
    return loss, (extra, metrics | more)

  # Data.

  @abc.abstractmethod
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract arrays of a global batch: of the largest."""

  def batches(
    self, start: int, skip: int = 0, rows: np.ndarray | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over the endless training batches.

    Args:
      start: number of the first batch.
      skip: examples left out before batch 0: batch k begins with example
        `skip` + k * batch size.
      rows: rows of each global batch to read; None for all.
    """
    return pipeline.iterate(
      self._train_data,
      start_batch=start,
      num_threads=self.config.data.get("threads", 2),
      rows=rows,
      skip=skip,
    )

  def data_progress(self, example: int) -> dict[str, float]:
    """Returns metrics of the training data before an example; {} for none."""
    if self._train_data is None:
      return {}
    return self._train_data.progress(example)

  def data_meta(self, example: int) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the data before an example."""
    del example
    return {}

  def check_data(self, stored: Mapping[str, Any]) -> None:
    """Checks that a run's data go on as `data_meta` of its checkpoint says."""
    del stored

  def held_out_batches(
    self, rows: np.ndarray | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over the first config.eval.batches held-out batches.

    Args:
      rows: rows of each global batch to read; None for all.
    """
    data = pipeline.iterate(
      self._held_out_data, start_batch=0, num_threads=0, rows=rows
    )
    count = min(self.config.eval.batches, len(self._held_out_data))
    for _ in range(count):
      yield next(data)

  def count_tokens(self, batch: Mapping[str, np.ndarray]) -> int:
    """Returns the LLM tokens of a host batch; 0 for stages without an LLM."""
    if "segments" not in batch:
      return 0
    return int((batch["segments"] > 0).sum())

  # Evaluation and result.

  @abc.abstractmethod
  def held_out_metrics(
    self, params: Params, frozen: Frozen, extra: Extra, batch: Batch
  ) -> dict[str, Any]:
    """Computes the metrics of one held-out batch.

    Args:
      params: of the stage.
      frozen: see `load_frozen`.
      extra: of the train state.
      batch: a whole batch.

    Returns:
      {name: metric of `averages`}; "images" may hold uint8[N, H, W, 3] of the
      batch's first rows, to be looked at.
    """

  @abc.abstractmethod
  def export(
    self, params: Params, extra: Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns what the stage writes to config.model_dir when it ends.

    Args:
      params: of the last step.
      extra: of the last step.

    Returns:
      {part: (tree of arrays, the stage's entries of part.json)}.
    """

  def provenance(self) -> dict[str, str]:
    """Returns {name: fingerprint} of all inputs that the run depends on.

    Here its data; stages add their caches and frozen weights. Names are those
    of `train/resilience/provenance.py`.
    """
    return {
      "train_data": contents.of(self.source),
      "held_out_data": contents.of(self.held_out),
    }
