"""Lowers the step of a phase by shapes alone, for any mesh.

`lavit compile` lowers for chips that are not there just what `lavit train`
runs.
"""

import jax

from lavit_jax.core import sharding
from lavit_jax.train import optimizer
from lavit_jax.train import step as step_lib


def optimizer_state(tx, boxed_params, labels, mesh):
  """The abstract, sharded state of an optimizer."""
  boxed = jax.eval_shape(
    lambda p: tx.init(optimizer.select(p, labels)), boxed_params
  )
  return sharding.abstract(boxed, mesh)


def lower(objective, config, phase, mesh):
  """Lowers the step of a phase for a mesh: `trace`, and then that."""
  with sharding.use(mesh):
    traced, given = trace(objective, config, phase, mesh)
    return traced.lower(), given


def trace(objective, config, phase, mesh):
  """Traces the step of a phase for a mesh, by shapes alone.

  Args:
    objective: a stage, of a `AbstractArtifacts` too.
    config: of the run.
    phase: one of `phases.phases_of`.
    mesh: of devices that may be a topology which is not there.

  Returns:
    `jax.stages.Traced`, and the abstract (state, frozen, batch).
  """
  given, labels, tx = _prepared(objective, config, phase, mesh)
  with sharding.use(mesh):
    made = step_lib.jit_step(
      objective, phase, labels, tx, mesh, sharding.layout_of(given[0])
    )
    return made.trace(*given), given


def arguments(objective, config, phase, mesh):
  """The abstract, sharded (state, frozen, batch) of a step; see `trace`.

  With what the step makes of them, they are all that lives through a run.
  """
  return _prepared(objective, config, phase, mesh)[0]


def _prepared(objective, config, phase, mesh):
  """What a step takes, the groups of its parameters, and its optimizer."""
  step_lib.check_accumulation(config, mesh)
  with sharding.use(mesh):
    boxed = jax.eval_shape(step_lib.init_fn(objective, config.seed))
    state = sharding.abstract(boxed, mesh)
    labels = objective.labels(phase, state.params)
    tx = optimizer.make(config.optimizer, phase, labels, boxed.params)
    opt = optimizer_state(tx, boxed.params, labels, mesh)
    state = state.replace(opt_state=opt)
    frozen = sharding.abstract(objective.frozen_shapes(), mesh)
    rows = sharding.batch_sharding(mesh)
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
      for name, x in objective.batch_shapes().items()
    }
    return (state, frozen, batch), labels, tx
