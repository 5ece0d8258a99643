"""The train step: state, gradients of a batch, update, and its jit.

A step is pure: (state, frozen, batch) -> (state, metrics). What a stage learns
is its objective's business (`objectives/base.py`), how fast the optimizer's.

A batch too large to be held at once is cut into `config.accumulate` parts that
are run one after the other. That changes memory alone: an objective gives
*sums* over a part, which add up to those of the batch, and `combine` makes the
loss of them, whatever it is. By the chain rule

  d combine(S) / d params = sum over parts of (d combine / d S)(S) d S_part,

where S are the sums of the whole batch. So S has to be known first, but only
as far as the slopes d combine / d S depend on it: these sums are `norms`, most
often counts that need no network. What is random is drawn for the whole batch
before it is cut.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import averages, compiler_options, errors, sharding
from lavit_jax.train import optimizer
from lavit_jax.train.resilience import nonfinite


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds as arrays.

  Attributes:
    step: int32[], updates done.
    params: the stage's parameters, float32.
    opt_state: optimizer moments of this phase's trainable parameters.
    extra: what changes without a gradient (codebook sums, EMA weights).
    rng: uint32[2], key data of the run; step keys are folded from it.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  extra: Any
  rng: jax.Array


def step_rng(state: TrainState) -> jax.Array:
  """The key of this step: the same after a resume."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def init_fn(objective, seed: int) -> Callable[[], TrainState]:
  """A traceable function that makes the first (boxed) state of a run."""

  def init():
    key = jax.random.key(seed)
    init_key, run_key = jax.random.split(key)
    params, extra = objective.init(init_key)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=None,
      extra=extra,
      rng=jax.random.key_data(run_key),
    )

  return init


def make_step(objective, phase, labels, tx):
  """The pure update of one phase: (state, frozen, batch) -> state, metrics.

  Metrics are those of `averages`; `learning_rate` is what the optimizer used.
  Only parameters whose label is not `optimizer.FROZEN` are differentiated, so
  that XLA never builds a backward graph for the others. Under the policy "skip"
  (see `nonfinite`) a step that is not finite changes nothing but the count of
  steps; `skipped` is 1 then.
  """
  skips = nonfinite.policy_of(objective.config).policy == "skip"
  parts = int(objective.config.get("accumulate", 1))
  differentiate = value_and_grad(objective, phase, parts)

  def step(state: TrainState, frozen, batch):
    rng = step_rng(state)
    trainable = optimizer.select(state.params, labels)

    merge = lambda trainable: optimizer.merge(trainable, state.params)
    (loss, (seen, metrics)), grads = differentiate(
      merge, trainable, frozen, state.extra, batch, rng
    )
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = merge(optax.apply_updates(trainable, updates))
    extra, more = objective.update_extra(phase, state.extra, seen, params)
    norm = optax.tree.norm(grads)
    rate = optimizer.learning_rate(phase, state.opt_state)
    metrics = metrics | more
    metrics["grad_norm"] = averages.of_step(norm)
    metrics["learning_rate"] = averages.last(rate)
    new = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state, extra=extra
    )
    if skips:
      good = jnp.isfinite(loss) & jnp.isfinite(norm)
      metrics["skipped"] = averages.Sum(1.0 - good)
      kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
      new = kept.replace(step=new.step)
    return new, metrics

  return step


def jit_step(objective, phase, labels, tx, mesh, layout):
  """The jitted step (state, frozen, batch) -> (state, metrics).

  The state is donated, and comes back laid out as it went in. What the step
  does not use stays an argument: it lives as long, so XLA's account has it.

  Args:
    objective: a stage.
    phase: of the run.
    labels: groups of the parameters, see `Objective.labels`.
    tx: the phase's optimizer.
    mesh: whose devices run it.
    layout: shardings of the state.
  """
  return jax.jit(
    make_step(objective, phase, labels, tx),
    donate_argnums=0,
    keep_unused=True,
    out_shardings=(layout, None),
    compiler_options=compiler_options.of_mesh(mesh, objective.config),
  )


def value_and_grad(objective, phase, parts: int):
  """`jax.value_and_grad` of an objective's loss over a batch in parts.

  Args:
    objective: see `objectives.base.Objective`; of it `draws`, `norms`, `sums`,
      `combine` and `merge_seen`.
    phase: of the run.
    parts: in how many a batch is cut; 1 for none.

  Returns:
    (merge, trainable, frozen, extra, batch, rng) -> ((loss, (seen, metrics)),
    grads), where `merge` makes the parameters of the trainable ones, and
    `seen` is what `Objective.update_extra` asks for.
  """

  def whole(merge, trainable, frozen, extra, batch, rng):
    draws = objective.draws(phase, batch, rng)

    def loss(trainable):
      sums, seen = objective.sums(
        phase, merge(trainable), frozen, extra, batch, draws
      )
      value, metrics = objective.combine(phase, sums)
      return value, (seen, metrics)

    return jax.value_and_grad(loss, has_aux=True)(trainable)

  def in_parts(merge, trainable, frozen, extra, batch, rng):
    given = batch, objective.draws(phase, batch, rng)
    given = jax.tree_util.tree_map_with_path(
      lambda path, x: split_batch(jax.tree_util.keystr(path), x, parts), given
    )
    run = lambda part, params: objective.sums(
      phase, merge(params), frozen, extra, *part
    )
    norms = _added(
      lambda part: objective.norms(
        phase, merge(trainable), frozen, extra, *part
      ),
      given,
    )
    first = jax.tree.map(lambda x: x[0], given)
    sums, seen = _zeros(run, first, trainable)
    slopes = jax.grad(lambda sums: objective.combine(phase, sums)[0])(
      sums | norms
    )

    def one(carry, part):
      grads, sums, seen = carry
      more, pull, found = jax.vjp(
        lambda params: run(part, params), trainable, has_aux=True
      )
      grads = jax.tree.map(jnp.add, grads, *pull(slopes))
      sums = jax.tree.map(jnp.add, sums, more)
      return (grads, sums, objective.merge_seen(seen, found)), None

    start = jax.tree.map(jnp.zeros_like, trainable), sums, seen
    (grads, sums, seen), _ = jax.lax.scan(one, start, given)
    loss, metrics = objective.combine(phase, sums)
    return (loss, (seen, metrics)), grads

  return whole if parts == 1 else in_parts


def _zeros(function, *args):
  """Zeros in the shapes that a function gives."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
  )


def _added(function, given):
  """The sum of a function's trees over the parts."""
  zeros = _zeros(function, jax.tree.map(lambda x: x[0], given))
  add = lambda total, part: (
    jax.tree.map(jnp.add, total, function(part)),
    None,
  )
  return jax.lax.scan(add, zeros, given)[0]


def split_batch(name: str, x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] to [parts, B / parts, ...], every part with rows of all devices.

  Row i goes to part i % parts: rows of a device stay where they are.
  """
  if x.shape[0] % parts:
    raise errors.ConfigError(
      f"config.accumulate={parts} does not divide the batch of {x.shape[0]}"
      f" rows ({name}). Make config.batch_size a multiple of it."
    )
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def check_accumulation(config, mesh: jax.sharding.Mesh) -> None:
  """Asks whether every part of a batch has rows for all devices.

  A part with fewer would be whole on every device, where attention kernels
  cannot be used: more memory and time than without parts.

  Args:
    config: of the run; of it `accumulate`, 1 if it is missing, and
      `batch_size`.
    mesh: whose data and fsdp split the rows.

  Raises:
    errors.ConfigError: they have not, or `accumulate` is no whole number of 1
      or more.
  """
  parts, rows = config.get("accumulate", 1), config.batch_size
  if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
    raise errors.ConfigError(
      f"config.accumulate={parts}: expected in how many parts a batch is run,"
      " a whole number. Set it to 1 for none."
    )
  sharding.check_batch(mesh, rows)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % (parts * ways) == 0:
    return
  each = rows // ways
  fits = min(
    (n for n in range(1, each + 1) if each % n == 0),
    key=lambda n: (abs(n - parts), -n),
  )
  nearest = max(round(rows / (parts * ways)), 1) * parts * ways
  raise errors.ConfigError(
    f"config.accumulate={parts} cuts a batch of {rows} rows into parts of"
    f" {rows / parts:g}, which data x fsdp = {ways} devices do not divide. Set"
    f" config.accumulate={fits}, or config.batch_size={nearest}."
  )
