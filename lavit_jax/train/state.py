"""The state of a run and the pure step that advances it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import averages
from lavit_jax.train import accumulation, optimizer
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
  differentiate = accumulation.value_and_grad(objective, phase, parts)

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


def unbox(tree):
  """A tree of (abstract) arrays without their logical-axis boxes.

  Unlike `nn.meta.unbox` it adds no sharding constraint: the layout is given
  from outside, by `shardings`.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(
    lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box
  )
