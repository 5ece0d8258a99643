"""Programs that run before a phase, the same for a run and its report.

`lavit train` runs them on its mesh; `lavit compile` lowers them, beside the
step, for chips that this machine does not have. Each program takes as arguments
all arrays that a device holds at that time, used or not, so that XLA's account
of memory includes them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import compiler_options, hosts, sharding
from lavit_jax.train import lowering, optimizer, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import base


def begin(
  objective: base.Objective,
  phase: phases.Phase,
  state: step_lib.TrainState,
  frozen: Any,
  batch_at: Callable[[int], Any],
  mesh: jax.sharding.Mesh,
) -> step_lib.TrainState:
  """Computes the state that a phase begins with.

  In this order: `Objective.begin_phase`, `Objective.folds`, the optimizer's
  state.

  Args:
    objective: of the stage.
    phase: that begins.
    state: on the mesh. Its optimizer state, and the arrays that `begin_phase`
      replaces, are deleted, even if somebody else refers to them: they would
      take memory beside what is computed.
    frozen: see `Objective.load_frozen`, on the mesh.
    batch_at: maps the index of a global batch to the batch, on the mesh.
    mesh: whose devices compute.
  """
  _delete(state.opt_state)
  state = _read(objective, phase, state.replace(opt_state=None))
  for fold in objective.folds(phase):
    programs = _programs(objective, fold, state, mesh)
    changed = _run_fold(fold, programs, phase, state, frozen, batch_at)
    state = state.replace(extra=state.extra | changed)
  init = _moments(objective, phase, state.params, mesh)
  return state.replace(opt_state=init(state, frozen))


def _delete(tree: Any) -> None:
  for array in jax.tree.leaves(tree):
    array.delete()


def _read(objective, phase, state: step_lib.TrainState) -> step_lib.TrainState:
  """Runs `begin_phase`, and deletes the arrays that it replaces."""
  layout = sharding.layout_of(state)
  start = objective.begin_phase(phase, state)
  kept = {id(x) for x in jax.tree.leaves(start)}
  before = jax.tree.leaves((state.params, state.extra))
  _delete([x for x in before if id(x) not in kept])
  params, extra = hosts.put(start, (layout.params, layout.extra))
  return state.replace(params=params, extra=extra)


def _run_fold(fold, programs, phase, state, frozen, batch_at):
  """Returns what a fold computes; its carry and batches are freed."""
  carry = programs.start()
  for number in range(fold.batches):  # the next is put while one is added
    batch = batch_at(phase.start + number)
    carry = programs.add(carry, np.int32(number), state, frozen, batch)
    del batch
  return programs.finish(carry, state, frozen)


def add_name(fold: base.Fold) -> str:
  """Returns the name that `lower` gives a fold's `add`, run once a batch."""
  return f"{fold.name}, each of {fold.batches} batches"


def lower(
  objective: base.Objective,
  phase: phases.Phase,
  state: step_lib.TrainState,
  frozen: Any,
  batch: Any,
  mesh: jax.sharding.Mesh,
) -> dict[str, jax.stages.Lowered]:
  """Lowers the programs of `begin` from shapes alone.

  Args:
    objective: of a stage.
    phase: that begins.
    state: abstract and sharded, as are the next two; see `lowering.arguments`.
    frozen: likewise.
    batch: likewise.
    mesh: the current one; its devices may be those of a topology that is only
      described.

  Returns:
    {name: lowered program}.
  """
  state = state.replace(opt_state=None)
  lowered: dict[str, jax.stages.Lowered] = {}
  for fold in objective.folds(phase):
    programs = _programs(objective, fold, state, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    carry = programs.carry
    lowered |= {
      add_name(fold): programs.add.lower(carry, number, state, frozen, batch),
      f"{fold.name}, at the end": programs.finish.lower(carry, state, frozen),
    }
  init = _moments(objective, phase, state.params, mesh)
  return lowered | {"moments": init.lower(state, frozen)}


@dataclasses.dataclass(frozen=True)
class _Programs:
  """A fold's functions, jitted for a mesh; `carry` is abstract and sharded."""

  carry: Any
  start: Any
  add: Any
  finish: Any


def _programs(objective, fold, state, mesh) -> _Programs:
  # These are no parameters: a device holds as much as of the batches.
  carry = sharding.abstract(jax.eval_shape(fold.start), mesh, whole=True)
  jit = functools.partial(
    jax.jit,
    keep_unused=True,
    compiler_options=compiler_options.of_mesh(mesh, objective.config),
  )

  def start():
    return sharding.unbox(fold.start())

  def finish(carry, state, frozen):
    del frozen  # in memory at the same time
    return fold.finish(carry, state)

  changed = jax.eval_shape(fold.finish, carry, state)
  layout = sharding.layout_of({name: state.extra[name] for name in changed})
  carry_layout = sharding.layout_of(carry)
  return _Programs(
    carry,
    jit(_named(start, fold), out_shardings=carry_layout),
    jit(_named(fold.add, fold), out_shardings=carry_layout, donate_argnums=0),
    jit(_named(finish, fold), out_shardings=layout),
  )


def _named(function, fold):
  """Returns the function under a name that traces and caches show."""

  def named(*args):
    return function(*args)

  named.__name__ = f"{fold.name}_{function.__name__.strip('_')}"
  return named


def _moments(objective, phase, params, mesh):
  """Jits (state, frozen) -> the first optimizer state of a phase."""
  config = objective.config
  labels = objective.labels(phase, params)
  boxed, _ = objective.init_shapes
  tx = optimizer.make(config.optimizer, phase, labels, boxed)
  opt_state = lowering.optimizer_state(tx, boxed, labels, mesh)

  def moments(state, frozen):
    del frozen  # in memory at the same time
    return tx.init(optimizer.select(state.params, labels))

  return jax.jit(
    moments,
    keep_unused=True,
    out_shardings=sharding.layout_of(opt_state),
    compiler_options=compiler_options.of_mesh(mesh, config),
  )
