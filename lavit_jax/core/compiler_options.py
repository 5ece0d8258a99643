"""Options of XLA for the devices of a mesh."""

import jax

from lavit_jax.core import errors

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


def of_mesh(mesh: jax.sharding.Mesh, config) -> dict:
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
