"""What is computed between phases: pure programs, the same for run and report.

`lavit train` runs them on its mesh; `lavit compile` lowers them for chips that
are not there, beside the step. Each takes all that lies in a device's memory
then, used or not, so that XLA's account of a program is of the whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import compiler_options, hosts, sharding
from lavit_jax.train import lowering, optimizer
from lavit_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
  """Something in `state.extra` that is computed of batches, one after another.

  All functions are pure. The state they get has no moments.

  Attributes:
    name: for reports, "kmeans".
    batches: how many, from the phase's first on.
    start: () -> what is carried, boxed as parameters are.
    add: (carried, the batch's number int32[], state, frozen, batch) -> carried.
    finish: (carried, state) -> the new values of some names of `state.extra`.
  """

  name: str
  batches: int
  start: Callable[[], Any]
  add: Callable[..., Any]
  finish: Callable[..., dict[str, Any]]


def begin(objective, phase, state, frozen, batch_at, mesh):
  """The state that a phase begins with: `begin_phase`, `folds`, then moments.

  Args:
    objective: a stage.
    phase: that begins.
    state: `TrainState` on the mesh. Its moments, and what `begin_phase`
      replaces, are deleted, whoever else still holds them: they would lie
      beside what is computed.
    frozen: the objective's, on the mesh.
    batch_at: index of a global batch to the batch, on the mesh.
    mesh: whose devices compute.
  """
  _delete(state.opt_state)
  state = _read(objective, phase, state.replace(opt_state=None))
  for fold in objective.folds(phase):
    programs = _programs(objective, fold, state, mesh)
    made = _folded(fold, programs, phase, state, frozen, batch_at)
    state = state.replace(extra=state.extra | made)
  init = _moments(objective, phase, state.params, mesh)
  return state.replace(opt_state=init(state, frozen))


def _delete(tree):
  for array in jax.tree.leaves(tree):
    array.delete()


def _read(objective, phase, state):
  """The state with what `begin_phase` gives; what that replaces is deleted."""
  layout = sharding.layout_of(state)
  given = objective.begin_phase(phase, state)
  kept = {id(x) for x in jax.tree.leaves(given)}
  before = jax.tree.leaves((state.params, state.extra))
  _delete([x for x in before if id(x) not in kept])
  params, extra = hosts.put(given, (layout.params, layout.extra))
  return state.replace(params=params, extra=extra)


def _folded(fold, programs, phase, state, frozen, batch_at):
  """What a fold makes; what it carries, and its batches, end with it."""
  carried = programs.start()
  for number in range(fold.batches):  # the next is put while one is added
    batch = batch_at(phase.start + number)
    carried = programs.add(carried, np.int32(number), state, frozen, batch)
    del batch
  return programs.finish(carried, state, frozen)


def each(fold: Fold) -> str:
  """The name of the program of one of its batches; see `lower`."""
  return f"{fold.name}, each of {fold.batches} batches"


def lower(objective, phase, state, frozen, batch, mesh):
  """Lowers the programs of `begin`, by shapes alone.

  Args:
    objective: a stage.
    phase: that begins.
    state: abstract and sharded; see `lowering.lower`, also for the next two.
    frozen: likewise.
    batch: likewise.
    mesh: current, of devices that may be a topology which is not there.

  Returns:
    {name: jax.stages.Lowered}.
  """
  state = state.replace(opt_state=None)
  found = {}
  for fold in objective.folds(phase):
    programs = _programs(objective, fold, state, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    carried = programs.carried
    found |= {
      each(fold): programs.add.lower(carried, number, state, frozen, batch),
      f"{fold.name}, at the end": programs.finish.lower(carried, state, frozen),
    }
  init = _moments(objective, phase, state.params, mesh)
  return found | {"moments": init.lower(state, frozen)}


@dataclasses.dataclass(frozen=True)
class _Programs:
  """A fold, compiled for a mesh; `carried` is abstract and sharded."""

  carried: Any
  start: Callable
  add: Callable
  finish: Callable


def _programs(objective, fold, state, mesh) -> _Programs:
  # No parameters: as whole on a device as the batches they are made of.
  carried = sharding.abstract(jax.eval_shape(fold.start), mesh, whole=True)
  jit = functools.partial(
    jax.jit,
    keep_unused=True,
    compiler_options=compiler_options.of_mesh(mesh, objective.config),
  )

  def start():
    return sharding.unbox(fold.start())

  def finish(carried, state, frozen):
    del frozen  # in memory beside it
    return fold.finish(carried, state)

  made = jax.eval_shape(fold.finish, carried, state)
  layout = sharding.layout_of({name: state.extra[name] for name in made})
  over = sharding.layout_of(carried)
  return _Programs(
    carried,
    jit(_named(start, fold), out_shardings=over),
    jit(_named(fold.add, fold), out_shardings=over, donate_argnums=0),
    jit(_named(finish, fold), out_shardings=layout),
  )


def _named(function, fold):
  """The function under a name that traces and caches show."""

  def named(*args):
    return function(*args)

  named.__name__ = f"{fold.name}_{function.__name__.strip('_')}"
  return named


def _moments(objective, phase, params, mesh):
  """The jitted (state, frozen) -> fresh moments of a phase."""
  config = objective.config
  labels = objective.labels(phase, params)
  boxed = jax.eval_shape(step_lib.init_fn(objective, config.seed)).params
  tx = optimizer.make(config.optimizer, phase, labels, boxed)
  made = lowering.optimizer_state(tx, boxed, labels, mesh)

  def moments(state, frozen):
    del frozen  # in memory beside them
    return tx.init(optimizer.select(state.params, labels))

  return jax.jit(
    moments,
    keep_unused=True,
    out_shardings=sharding.layout_of(made),
    compiler_options=compiler_options.of_mesh(mesh, config),
  )
