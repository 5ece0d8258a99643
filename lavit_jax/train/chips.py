"""What accelerators can do at most, by the makers' own tables.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (peak bf16 FLOP/s, HBM, ICI)
and "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus. An ICI port
carries the half of the "bidirectional ICI bandwidth per chip" over the number
of ports, each way: v4 and v5e 50 GB/s, v5p and v6e 100 GB/s nominal, of which
the book finds 45 and 90 in use; these stand here. DCN is the sum of a host's
network cards (v5e: 2 x 100 Gbit/s, v6e: 4 x 200 Gbit/s, v4 and v5p: 200).

GPUs: NVIDIA's data sheets "A100 Tensor Core GPU" (SXM, 80 and 40 GB), "H100
Tensor Core GPU" and "H200 Tensor Core GPU" (SXM), dense bf16. NVLink is a
switched network: one axis, of which each way has half of the "NVLink
bandwidth" (600 and 900 GB/s). DCN is a DGX's: 8 cards of 200 or 400 Gbit/s.

Not held against their sources at all: `int8`. Not held against them again:
what ICI gives in use, all of v4, DCN of v4 and v6e, and the GPUs.
"""

import dataclasses

_GB = 1e9
_GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator.

  Attributes:
    name: as in topology names, "v5e".
    kinds: JAX's `device.device_kind`, as `kind_of` cuts it.
    flops: peak of bf16 products, FLOP/s.
    int8: how many products in int8 take the time of one in bf16.
    hbm_bytes: memory.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s of one link between chips, one way.
    torus_axes: axes of the torus; a chip has two links on each. 1: a switch.
    dcn_bandwidth: bytes/s of a host's network, one way.
    chips_per_host: chips that share it.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus_axes: int
  dcn_bandwidth: float
  chips_per_host: int
  int8: float = 2.0


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      kinds=("TPU v4",),
      flops=275e12,
      hbm_bytes=32 * _GIB,
      hbm_bandwidth=1228 * _GB,
      link_bandwidth=45 * _GB,
      torus_axes=3,
      dcn_bandwidth=25 * _GB,
      chips_per_host=4,
      int8=1.0,
    ),
    Chip(
      name="v5e",
      kinds=("TPU v5 lite", "TPU v5e", "TPU v5litepod"),
      flops=197e12,
      hbm_bytes=16 * _GIB,
      hbm_bandwidth=819 * _GB,
      link_bandwidth=45 * _GB,
      torus_axes=2,
      dcn_bandwidth=25 * _GB,
      chips_per_host=8,
    ),
    Chip(
      name="v5p",
      kinds=("TPU v5", "TPU v5p"),
      flops=459e12,
      hbm_bytes=95 * _GIB,
      hbm_bandwidth=2765 * _GB,
      link_bandwidth=90 * _GB,
      torus_axes=3,
      dcn_bandwidth=25 * _GB,
      chips_per_host=4,
    ),
    Chip(
      name="v6e",
      kinds=("TPU v6 lite", "TPU v6e"),
      flops=918e12,
      hbm_bytes=32 * _GIB,
      hbm_bandwidth=1638 * _GB,
      link_bandwidth=90 * _GB,
      torus_axes=2,
      dcn_bandwidth=100 * _GB,
      chips_per_host=8,
    ),
    Chip(
      name="a100",
      kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
      flops=312e12,
      hbm_bytes=80 * _GIB,
      hbm_bandwidth=2039 * _GB,
      link_bandwidth=300 * _GB,
      torus_axes=1,
      dcn_bandwidth=200 * _GB,
      chips_per_host=8,
    ),
    Chip(
      name="a100-40gb",
      kinds=("NVIDIA A100-SXM4-40GB",),
      flops=312e12,
      hbm_bytes=40 * _GIB,
      hbm_bandwidth=1555 * _GB,
      link_bandwidth=300 * _GB,
      torus_axes=1,
      dcn_bandwidth=200 * _GB,
      chips_per_host=8,
    ),
    Chip(
      name="h100",
      kinds=("NVIDIA H100 80GB HBM3",),
      flops=989e12,
      hbm_bytes=80 * _GIB,
      hbm_bandwidth=3350 * _GB,
      link_bandwidth=450 * _GB,
      torus_axes=1,
      dcn_bandwidth=400 * _GB,
      chips_per_host=8,
    ),
    Chip(
      name="h200",
      kinds=("NVIDIA H200",),
      flops=989e12,
      hbm_bytes=141e9,
      hbm_bandwidth=4800 * _GB,
      link_bandwidth=450 * _GB,
      torus_axes=1,
      dcn_bandwidth=400 * _GB,
      chips_per_host=8,
    ),
  )
}

_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}


def of_device(device) -> Chip | None:
  """The chip of a `jax.Device`, also of one of a topology; None if unknown.

  CPUs are unknown: what they can do at most depends on too much.
  """
  return _BY_KIND.get(device.device_kind)
