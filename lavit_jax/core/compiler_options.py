"""XLA's compiler options for the devices of a mesh."""

from collections.abc import Mapping
from typing import Any

import jax

from lavit_jax.core import errors

# On all TPUs the reduction of gradients between slices may overlap with the
# backward pass.
_TPU = {
  "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
  "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# On v5e weights are gathered in pieces that are fused into the products that
# use them. libtpu refuses these options on other chips.
_V5E = {
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
  "xla_enable_async_all_gather": "true",
}
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}


def of_mesh(
  mesh: jax.sharding.Mesh, config: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns XLA's options for programs on the devices of a mesh.

  Args:
    mesh: of devices of one kind.
    config: of the run. Its `compiler_options`, if any, take precedence: those
      that begin with xla_tpu_ on TPUs, those with xla_gpu_ on GPUs.

  Raises:
    errors.ConfigError: an option begins with neither.
  """
  device = mesh.devices.flat[0]
  options: dict[str, Any] = {}
  if device.platform == "tpu":
    options |= _TPU
  if device.platform == "gpu":
    options |= _GPU
  if device.device_kind in ("TPU v5 lite", "TPU v5e"):
    options |= _V5E
  extra = dict(config.get("compiler_options", {}))
  if bad := [x for x in extra if not x.startswith(("xla_tpu_", "xla_gpu_"))]:
    raise errors.ConfigError(
      f"compiler_options has {bad}: expected names that begin with xla_tpu_ or"
      " xla_gpu_. Other options of XLA go into the environment's XLA_FLAGS."
    )
  prefix = f"xla_{device.platform}_"
  return options | {k: v for k, v in extra.items() if k.startswith(prefix)}
