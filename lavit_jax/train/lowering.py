"""Lowers the step of a phase from shapes alone, for any mesh.

`lavit compile` lowers the very programs that `lavit train` runs, for chips that
this machine does not have.
"""

from typing import Any

import jax
import ml_collections
import optax

from lavit_jax.core import sharding
from lavit_jax.train import optimizer, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import base


def optimizer_state(
  tx: optax.GradientTransformation,
  boxed_params: Any,
  labels: Any,
  mesh: jax.sharding.Mesh,
) -> Any:
  """Returns the abstract, sharded state of an optimizer.

  Args:
    tx: the optimizer.
    boxed_params: (abstract) parameters with their logical axes.
    labels: groups of the parameters, see `Objective.labels`.
    mesh: whose devices hold the state.
  """
  boxed = jax.eval_shape(
    lambda p: tx.init(optimizer.select(p, labels)), boxed_params
  )
  return sharding.abstract(boxed, mesh)


def lower(
  objective: base.Objective,
  config: ml_collections.ConfigDict,
  phase: phases.Phase,
  mesh: jax.sharding.Mesh,
) -> tuple[jax.stages.Lowered, tuple[Any, ...]]:
  """Lowers the step of a phase for a mesh.

  Arguments are those of `trace`.

  Returns:
    The lowered step, and its abstract arguments (state, frozen, batch).
  """
  with sharding.use(mesh):
    traced, inputs = trace(objective, config, phase, mesh)
    return traced.lower(), inputs


def trace(
  objective: base.Objective,
  config: ml_collections.ConfigDict,
  phase: phases.Phase,
  mesh: jax.sharding.Mesh,
) -> tuple[jax.stages.Traced, tuple[Any, ...]]:
  """Traces the step of a phase for a mesh.

  Args:
    objective: of a stage; one of `AbstractArtifacts` will do.
    config: of the run.
    phase: one of `phases.phases_of`.
    mesh: its devices may be those of a topology that is only described.

  Returns:
    The traced step, and its abstract arguments (state, frozen, batch).
  """
  inputs, labels, tx = _prepare(objective, config, phase, mesh)
  with sharding.use(mesh):
    step = step_lib.jit_step(
      objective, phase, labels, tx, mesh, sharding.layout_of(inputs[0])
    )
    return step.trace(*inputs), inputs


def arguments(
  objective: base.Objective,
  config: ml_collections.ConfigDict,
  phase: phases.Phase,
  mesh: jax.sharding.Mesh,
) -> tuple[Any, ...]:
  """Returns the abstract, sharded (state, frozen, batch) of a step.

  With what the step computes from them they are all arrays that live through a
  run. Arguments are those of `trace`.
  """
  return _prepare(objective, config, phase, mesh)[0]


def _prepare(objective, config, phase, mesh):
  """Returns a step's arguments, the labels of its parameters, its optimizer."""
  step_lib.check_accumulation(config, mesh)
  with sharding.use(mesh):
    boxed = step_lib.abstract_state(objective)
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
