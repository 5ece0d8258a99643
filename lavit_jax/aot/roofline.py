"""The least time that a step can take on a device, from its compiled program.

Nothing here is measured. A step does three things, each at most as fast as the
chip's table says:

  compute  executed FLOPs at the peak of bf16 products, recomputation included;
           products of int8 and of fp8 arrays at their own peaks
  HBM      bytes read and written, as `executed.hbm_bytes` estimates them
  ICI      collectives by rings over the axes of the torus, both ways at once:
           a group of n devices that gathers B bytes receives (n - 1) / n B of
           them over its links: see `topology.routes`. Groups of a size that no
           axes of the mesh make are taken to have the links of one axis. Where
           a group spans slices, each chip also sends its share of the B bytes
           to the other slices, over its share of the host's network; that time
           is added to ICI's.

`step_s` is the largest of the three: perfect overlap. `step_s_no_overlap` is
compute + ICI, as if nothing were sent while anything is computed; HBM counts
only if it takes longer than compute. A real step lies between. Kernel launches,
latency of collectives, the vector units and the host are left out.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from lavit_jax.aot import collectives, topology
from lavit_jax.cost import chips


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step and the model FLOP utilisation (MFU) that follows.

  MFU is relative to the peak of bf16 products: with int8 or fp8 it may exceed
  1. It is the same for a device and its chip.

  Attributes:
    compute_s: of compute alone.
    hbm_s: of HBM alone.
    ici_s: of ICI, and of the network between slices.
    step_s: with perfect overlap.
    step_s_no_overlap: without overlap of compute and ICI.
    mfu: by `step_s`.
    mfu_no_overlap: by `step_s_no_overlap`.
  """

  compute_s: float
  hbm_s: float
  ici_s: float
  step_s: float
  step_s_no_overlap: float
  mfu: float
  mfu_no_overlap: float


def estimate(
  flops_executed: float,
  bytes_hbm: float,
  sent: Iterable[collectives.Collective],
  chip: chips.Chip,
  *,
  model_flops: float,
  int8_flops: float = 0.0,
  fp8_flops: float = 0.0,
  routes: Mapping[int, topology.Route] | None = None,
) -> Roofline:
  """Estimates the roofline of one step; see the module for its assumptions.

  Args:
    flops_executed: of one device.
    bytes_hbm: of one device.
    sent: the collectives of one device.
    chip: that runs the step.
    model_flops: of one device: those of the whole step over their number.
    int8_flops: those of `flops_executed` that are of int8 arrays.
    fp8_flops: those of `flops_executed` that are of fp8 arrays.
    routes: by the size of a group, see `topology.routes`.

  Raises:
    ValueError: an unknown kind of collective.
  """
  bf16_flops = flops_executed - int8_flops - fp8_flops
  # In units of bf16 FLOPs: `chip.int8` and `chip.fp8` are speed-ups.
  low_precision = int8_flops / chip.int8 + fp8_flops / chip.fp8
  compute = (bf16_flops + low_precision) / chip.flops
  hbm = bytes_hbm / chip.hbm_bandwidth
  ici = 0.0
  for one in sent:
    ici += one.times * seconds(one, chip, (routes or {}).get(one.group_size))
  overlap, no_overlap = max(compute, hbm, ici), max(compute, hbm) + ici
  useful = model_flops / chip.flops
  return Roofline(
    compute_s=compute,
    hbm_s=hbm,
    ici_s=ici,
    step_s=overlap,
    step_s_no_overlap=no_overlap,
    mfu=useful / overlap,
    mfu_no_overlap=useful / no_overlap,
  )


def seconds(
  one: collectives.Collective,
  chip: chips.Chip,
  route: topology.Route | None = None,
) -> float:
  """Estimates the time of one run of a collective.

  Args:
    one: the collective.
    chip: that runs it.
    route: how its devices reach each other; by default one axis of a torus.

  Raises:
    ValueError: an unknown kind of collective.
  """
  if one.kind not in collectives.KINDS:
    raise ValueError(f"kind={one.kind!r}: expected one of {collectives.KINDS}.")
  if one.group_size <= 1:
    return 0.0
  # Both ways round a ring; a switch has one link each way.
  links = (1 if chip.torus_axes == 1 else 2) / chip.devices_per_chip
  route = route or topology.Route(links)
  if one.kind == "collective-permute":
    return one.bytes / (chip.link_bandwidth / chip.devices_per_chip)
  size = one.group_size // route.slices  # within a slice
  factor = 2 if one.kind == "all-reduce" else 1
  between = (route.slices - 1) / route.slices * one.bytes / size
  within = (size - 1) / size * one.bytes
  if one.kind == "all-to-all" and chip.torus_axes > 1:
    # A chip's bytes travel a quarter of the ring on average.
    within *= max(size / 4, 1.0)
  ici = within / (route.links * chip.link_bandwidth)
  return factor * (ici + between / chip.dcn_bandwidth)
