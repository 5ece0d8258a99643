"""The compiled step of a phase: what `lavit train` runs on any mesh.

`lavit compile` lowers the same function for chips that are not there.
"""

import math

import jax

from lavit_jax.core import errors, sharding
from lavit_jax.train import accumulation, optimizer
from lavit_jax.train import state as state_lib

# What XLA is told when it compiles a step, by the kind of device. Everywhere
# the reduction of gradients between slices may overlap with the backward pass.
# On v5e weights are gathered in pieces fused into the products that use them,
# which libtpu refuses on other chips.
_TPU = {
  "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
  "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
_FUSED = {
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
  "xla_enable_async_all_gather": "true",
}
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}


def options(mesh: jax.sharding.Mesh, config) -> dict:
  """What XLA is told when it compiles for the devices of a mesh.

  Args:
    mesh: of devices of one kind.
    config: of the run. Its `compiler_options`, if it has them, come on top:
      those named xla_tpu_ on TPUs, those named xla_gpu_ on GPUs.

  Raises:
    errors.ConfigError: an option is for neither.
  """
  device = mesh.devices.flat[0]
  known = {"tpu": _TPU, "gpu": _GPU}.get(device.platform, {})
  if device.device_kind in ("TPU v5 lite", "TPU v5e"):
    known = known | _FUSED
  own = dict(config.get("compiler_options", {}))
  if odd := [x for x in own if not x.startswith(("xla_tpu_", "xla_gpu_"))]:
    raise errors.ConfigError(
      f"compiler_options has {odd}: expected names that begin with xla_tpu_ or"
      " xla_gpu_. Other options of XLA go into the environment's XLA_FLAGS."
    )
  prefix = f"xla_{device.platform}_"
  return known | {k: v for k, v in own.items() if k.startswith(prefix)}


def step(objective, phase, labels, tx, mesh, layout):
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
    state_lib.make_step(objective, phase, labels, tx),
    donate_argnums=0,
    keep_unused=True,
    out_shardings=(layout, None),
    compiler_options=options(mesh, objective.config),
  )


def layout_of(state):
  """The shardings of a tree of arrays, abstract ones too."""
  return jax.tree.map(lambda x: x.sharding, state)


def abstract(boxed, mesh, *, whole: bool = False):
  """Boxed shapes as unboxed ones, each with its sharding.

  Args:
    boxed: abstract arrays.
    mesh: over which they are split.
    whole: see `sharding.param_shardings`.
  """
  layout = sharding.param_shardings(boxed, mesh, whole=whole)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state_lib.unbox(boxed),
    layout,
  )


def optimizer_state(tx, boxed_params, labels, mesh):
  """The abstract, sharded state of an optimizer."""
  boxed = jax.eval_shape(
    lambda p: tx.init(optimizer.select(p, labels)), boxed_params
  )
  return abstract(boxed, mesh)


def lower(objective, config, phase, mesh):
  """Lowers the step of a phase for a mesh: `trace`, and then that."""
  with sharding.use(mesh):
    traced, given = trace(objective, config, phase, mesh)
    return traced.lower(), given


def trace(objective, config, phase, mesh):
  """Traces the step of a phase for a mesh, by shapes alone.

  Args:
    objective: a stage, of a `stored.Outline` too.
    config: of the run.
    phase: one of `phases.phases_of`.
    mesh: of devices that may be a topology which is not there.

  Returns:
    `jax.stages.Traced`, and the abstract (state, frozen, batch).
  """
  given, labels, tx = _prepared(objective, config, phase, mesh)
  with sharding.use(mesh):
    made = step(objective, phase, labels, tx, mesh, layout_of(given[0]))
    return made.trace(*given), given


def arguments(objective, config, phase, mesh):
  """The abstract, sharded (state, frozen, batch) of a step; see `trace`.

  With what the step makes of them, they are all that lives through a run.
  """
  return _prepared(objective, config, phase, mesh)[0]


def _prepared(objective, config, phase, mesh):
  """What a step takes, the groups of its parameters, and its optimizer."""
  accumulation.check(config, mesh)
  with sharding.use(mesh):
    boxed = jax.eval_shape(state_lib.init_fn(objective, config.seed))
    state = abstract(boxed, mesh)
    labels = objective.labels(phase, state.params)
    tx = optimizer.make(config.optimizer, phase, labels, boxed.params)
    opt = optimizer_state(tx, boxed.params, labels, mesh)
    state = state.replace(opt_state=opt)
    frozen = abstract(objective.frozen_shapes(), mesh)
    rows = sharding.batch_sharding(mesh)
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
      for name, x in objective.batch_shapes().items()
    }
    return (state, frozen, batch), labels, tx


def bytes_a_device(tree) -> int:
  """What one device holds of a tree of (abstract) arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
