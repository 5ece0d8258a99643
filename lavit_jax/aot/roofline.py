"""The least time that a step can take on a device, and what a program sends.

Nothing here is measured. A step does three things, each as fast as the chip's
table says it can be done at most:

  compute  executed FLOPs at the peak of bf16 products, recomputation included;
           products of int8 and of fp8 arrays at the peak of those
  HBM      bytes read and written; those of a program are XLA's own estimate
  ICI      collectives by rings over the axes of the torus, both ways at once:
           a group of n devices that gathers B bytes receives (n - 1) / n B of
           them over its links: see `topology.routes`. Groups of a size that no
           axes of the mesh make are taken to have those of one axis. Where a
           group spans slices, each chip also sends its share of the B bytes to
           the other slices, over its share of the host's network; that time
           is added to ICI's.

`step_s` is the largest of the three: perfect overlap. `step_s_no_overlap` is
compute + ICI, as if nothing were sent while anything is computed; HBM counts
only if it is above compute. The truth lies between. Kernel launches, latency
of collectives, work of the vector units and the host are left out.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from lavit_jax.aot import collectives, topology
from lavit_jax.cost import chips


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step and the model FLOP utilisation (MFU) they mean.

  MFU is of the peak of bf16 products: with int8 or fp8 it may be over 1. It is
  the same of a device and of its chip: both terms grow with their number.
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
  """The roofline of one step; see the module for its assumptions.

  Args:
    flops_executed: of one device.
    bytes_hbm: of one device.
    sent: by one device.
    chip: where it runs.
    model_flops: of one device: of the whole step over their number.
    int8_flops: those of `flops_executed` that are of int8 arrays.
    fp8_flops: those that are of fp8 arrays.
    routes: by the size of a group, see `topology.routes`.

  Raises:
    ValueError: an unknown kind of collective.
  """
  wide = flops_executed - int8_flops - fp8_flops
  narrow = int8_flops / chip.int8 + fp8_flops / chip.fp8
  compute = (wide + narrow) / chip.flops
  hbm = bytes_hbm / chip.hbm_bandwidth
  ici = 0.0
  for one in sent:
    ici += one.times * seconds(one, chip, (routes or {}).get(one.group_size))
  step, apart = max(compute, hbm, ici), max(compute, hbm) + ici
  useful = model_flops / chip.flops
  return Roofline(compute, hbm, ici, step, apart, useful / step, useful / apart)


def seconds(
  one: collectives.Collective,
  chip: chips.Chip,
  route: topology.Route | None = None,
) -> float:
  """Time of one run of a collective; by default over one axis of a torus.

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
