"""The train step: state, gradients of a batch, update, and its jit.

A step is a pure function (state, frozen, batch) -> (state, metrics). The
objective of a stage (`objectives/base.py`) defines the loss, `optimizer.py` the
update.

A batch too large to be held at once is run in `config.accumulate` parts, one
after the other. This changes memory alone, whatever the loss is: an objective
returns *sums* over the rows of a part, which add up to those of the batch, and
`combine` makes the loss of them. By the chain rule

  d combine(S) / d params = sum over parts of (d combine / d S)(S) d S_part,

where S are the sums of the whole batch. The slopes (d combine / d S)(S) depend
on S only where `combine` is not linear, so those sums are computed first
(`nonlinear_sums`): most often they are counts that need no network. All random
numbers are drawn for the whole batch before it is cut.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from lavit_jax.core import averages, compiler_options, errors, sharding
from lavit_jax.train import optimizer, phases
from lavit_jax.train.objectives import base
from lavit_jax.train.resilience import nonfinite

Step = Callable[..., tuple["TrainState", averages.Metrics]]


class TrainState(flax.struct.PyTreeNode):
  """All arrays of a checkpoint.

  Attributes:
    step: int32[], updates done.
    params: the stage's parameters, float32.
    opt_state: optimizer state of this phase's trainable parameters.
    extra: what changes without a gradient (codebook sums, EMA weights).
    rng: uint32[2], key data of the run; step keys are folded from it.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  extra: Any
  rng: jax.Array


def init_fn(objective: base.Objective, seed: int) -> Callable[[], TrainState]:
  """Returns a traceable function that makes a run's first state, boxed."""

  def init():
    key = jax.random.key(seed)
    init_key, run_key = jax.random.split(key)
    params, extra = objective.init(init_key)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=None,  # each phase has its own: see `boundaries.begin`
      extra=extra,
      rng=jax.random.key_data(run_key),
    )

  return init


def abstract_state(objective: base.Objective) -> Any:
  """Returns the shapes of a run's first state, boxed."""
  params, extra = objective.init_shapes

  def rest():
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(jnp.zeros((), jnp.int32), None, None, None, key)

  return jax.eval_shape(rest).replace(params=params, extra=extra)


def jit_init(objective: base.Objective, seed: int, layout: Any) -> Any:
  """Jits the making of a run's first state, () -> TrainState, unboxed.

  Args:
    objective: of the stage.
    seed: of the run.
    layout: shardings of the state.
  """
  init = init_fn(objective, seed)
  return jax.jit(lambda: sharding.unbox(init()), out_shardings=layout)


def jit_step(
  objective: base.Objective,
  phase: phases.Phase,
  labels: Any,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  layout: Any,
) -> Any:
  """Jits the step of a phase, (state, frozen, batch) -> (state, metrics).

  The state is donated and keeps its layout. Arguments that the step does not
  use stay arguments, so that XLA's account of memory includes all that lives
  through a run.

  Args:
    objective: of the stage.
    phase: of the run.
    labels: groups of the parameters, see `Objective.labels`.
    tx: the phase's optimizer.
    mesh: whose devices run the step.
    layout: shardings of the state.

  Returns:
    What `jax.jit` returns.
  """
  return jax.jit(
    make_step(objective, phase, labels, tx),
    donate_argnums=0,
    keep_unused=True,
    out_shardings=(layout, None),
    compiler_options=compiler_options.of_mesh(mesh, objective.config),
  )


def make_step(
  objective: base.Objective,
  phase: phases.Phase,
  labels: Any,
  tx: optax.GradientTransformation,
) -> Step:
  """Makes the pure step of a phase, (state, frozen, batch) -> state, metrics.

  Metrics are those of `averages`. Only parameters whose label is not
  `optimizer.FROZEN` are differentiated: XLA builds no backward graph for the
  others. Arguments are those of `jit_step`.
  """
  skips = nonfinite.policy_of(objective.config).policy == "skip"
  parts = int(objective.config.get("accumulate", 1))
  differentiate = value_and_grad(objective, phase, parts)

  def step(state: TrainState, frozen, batch):
    trainable = optimizer.select(state.params, labels)
    merge = lambda trainable: optimizer.merge(trainable, state.params)
    (loss, (stats, metrics)), grads = differentiate(
      merge, trainable, frozen, state.extra, batch, step_rng(state)
    )
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = merge(optax.apply_updates(trainable, updates))
    extra, more = objective.update_extra(phase, state.extra, stats, params)
    grad_norm = optax.tree.norm(grads)
    rate = optimizer.learning_rate(phase, state.opt_state)
    metrics = metrics | more
    metrics["grad_norm"] = averages.of_step(grad_norm)
    metrics["learning_rate"] = averages.last(rate)
    new = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, extra=extra
    )
    if skips:
      finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
      metrics["skipped"] = averages.Sum(1.0 - finite)
      new = _unless_skipped(finite, new, state)
    return new, metrics

  return step


def step_rng(state: TrainState) -> jax.Array:
  """Returns the key of a step: the same after a resume."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def _unless_skipped(finite, new: TrainState, old: TrainState) -> TrainState:
  """Returns `new` if `finite`, else `old`; either way the step counts."""
  chosen = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  return chosen.replace(step=new.step)


def value_and_grad(
  objective: base.Objective, phase: phases.Phase, parts: int
) -> Callable[..., Any]:
  """Differentiates an objective's loss over a batch, whole or in parts.

  Args:
    objective: of the stage.
    phase: of the run.
    parts: number of parts of a batch; 1 runs it at once.

  Returns:
    (merge, trainable, frozen, extra, batch, rng) -> ((loss, (stats, metrics)),
    grads). `merge` completes the trainable parameters to all; `stats` are what
    `Objective.update_extra` takes.
  """
  if parts > 1:
    return _value_and_grad_in_parts(objective, phase, parts)

  def run(merge, trainable, frozen, extra, batch, rng):
    draws = objective.draws(phase, batch, rng)

    def loss(trainable):
      params = merge(trainable)
      sums, stats = objective.sums(phase, params, frozen, extra, batch, draws)
      value, metrics = objective.combine(phase, sums)
      return value, (stats, metrics)

    return jax.value_and_grad(loss, has_aux=True)(trainable)

  return run


def _value_and_grad_in_parts(objective, phase, parts: int):
  """Implements `value_and_grad` for several parts; see the module's head."""

  def run(merge, trainable, frozen, extra, batch, rng):
    rows = batch, objective.draws(phase, batch, rng)
    rows = jax.tree_util.tree_map_with_path(
      lambda path, x: split_batch(jax.tree_util.keystr(path), x, parts), rows
    )
    part_sums = lambda part, trainable: objective.sums(
      phase, merge(trainable), frozen, extra, *part
    )
    nonlinear = _sum_over_parts(
      lambda part: objective.nonlinear_sums(
        phase, merge(trainable), frozen, extra, *part
      ),
      rows,
    )
    sums, stats = _zeros(part_sums, _first_part(rows), trainable)
    slopes = jax.grad(lambda sums: objective.combine(phase, sums)[0])(
      sums | nonlinear
    )

    def add_part(carry, part):
      grads, sums, stats = carry
      more_sums, pull, more_stats = jax.vjp(
        lambda trainable: part_sums(part, trainable), trainable, has_aux=True
      )
      grads = jax.tree.map(jnp.add, grads, *pull(slopes))
      sums = jax.tree.map(jnp.add, sums, more_sums)
      return (grads, sums, objective.merge_stats(stats, more_stats)), None

    start = jax.tree.map(jnp.zeros_like, trainable), sums, stats
    (grads, sums, stats), _ = jax.lax.scan(add_part, start, rows)
    loss, metrics = objective.combine(phase, sums)
    return (loss, (stats, metrics)), grads

  return run


def _sum_over_parts(function, rows):
  """Sums a function's trees over the parts [parts, B / parts, ...] of rows."""

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  return jax.lax.scan(add_part, _zeros(function, _first_part(rows)), rows)[0]


def _zeros(function, *args):
  """Returns zeros in the shapes that a function returns."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
  )


def _first_part(rows):
  return jax.tree.map(lambda x: x[0], rows)


def split_batch(name: str, x: jax.Array, parts: int) -> jax.Array:
  """Splits [B, ...] into [parts, B / parts, ...].

  Row i goes to part i % parts, so that each part has rows of all devices and
  rows stay on their device.

  Args:
    name: of the array, for the error.
    x: [B, ...].
    parts: their number.

  Raises:
    errors.ConfigError: the rows cannot be split evenly.
  """
  if x.shape[0] % parts:
    raise errors.ConfigError(
      f"config.accumulate={parts} does not divide the batch of {x.shape[0]}"
      f" rows ({name}). Make config.batch_size a multiple of it."
    )
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def check_accumulation(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> None:
  """Checks that every part of a batch has rows for all devices.

  A part with fewer rows would be whole on every device, where attention kernels
  cannot be used: more memory and time than without parts.

  Args:
    config: of the run; its `accumulate` (1 if missing) and `batch_size`.
    mesh: whose axes data and fsdp split the rows.

  Raises:
    errors.ConfigError: some device would have no rows, or `accumulate` is not
      an integer of 1 or more.
  """
  parts, rows = config.get("accumulate", 1), config.batch_size
  if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
    raise errors.ConfigError(
      f"config.accumulate={parts}: expected the number of parts that a batch is"
      " run in, an integer of 1 or more. Set it to 1 to run it at once."
    )
  sharding.check_batch(mesh, rows)
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % (parts * devices) == 0:
    return
  rows_each = rows // devices
  allowed = min(
    (n for n in range(1, rows_each + 1) if rows_each % n == 0),
    key=lambda n: (abs(n - parts), -n),
  )
  nearest = max(round(rows / (parts * devices)), 1) * parts * devices
  raise errors.ConfigError(
    f"config.accumulate={parts} cuts a batch of {rows} rows into parts of"
    f" {rows / parts:g}, which data x fsdp = {devices} devices do not divide."
    f" Set config.accumulate={allowed}, or config.batch_size={nearest}."
  )
