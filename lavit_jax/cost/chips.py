"""Peak rates of accelerators, from their makers' tables.

All figures are for one JAX device. That is a whole chip, except for TPU7x,
whose chips are two devices each (two dies, no "megacore").

TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, as of 2026: peak
bf16, int8 and fp8 FLOP/s, HBM and its bandwidth, "bidirectional ICI bandwidth
per chip", "DCN bandwidth per chip" (v5p 50 Gbit/s, v6e and TPU7x 100; v5e has
two cards of 100 Gbit/s for 8 chips). Compared with these pages: all of v5e,
v5p, v6e and TPU7x; of v4 the FLOP/s and HBM (the page has 1200 GB/s, JAX's own
table 1230). The pages leave out int8 of v5p and v6e: it is taken from JAX
(jax.experimental.pallas.tpu.get_tpu_info) and "How to Scale Your Model",
jax-ml.github.io/scaling-book/tpus. Neither has int8 of TPU7x, which counts as
bf16. The page gives v5p and v6e the same rate in fp8 as in bf16.

An ICI port carries half of the bandwidth of a chip over the number of its
ports, each way: nominally 50 GB/s on v4 and v5e and 100 on the others. The
book measures 45 and 90 in use for v4, v5e and v5p (a newer edition has 45 for
v4 alone, and the nominal figures). 90 % is assumed here for all.

GPUs: NVIDIA's data sheets "A100 Tensor Core GPU" (SXM, 80 and 40 GB), "H100
Tensor Core GPU" and "H200 Tensor Core GPU" (SXM), without sparsity. NVLink is a
switched network: one axis, of which each way has half of the "NVLink bandwidth"
(600 and 900 GB/s). DCN is a DGX's: 8 cards of 200 or 400 Gbit/s for 8 devices.

Not compared with a source again: ICI bandwidth in use, ICI and DCN of v4,
`die_links` of TPU7x (six times a link, from memory), and the GPUs.
"""

import dataclasses

import jax

_GB = 1e9
_GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Peak rates of one device of an accelerator.

  Attributes:
    name: of the chip, as in topology names: "v5e".
    kinds: values of JAX's `device.device_kind`.
    flops: peak rate of bf16 products, FLOP/s.
    hbm_bytes: size of its memory.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s of one link between chips, one way.
    torus_axes: axes of the torus; a chip has two links on each. 1: a switch.
    dcn_bandwidth: bytes/s of its share of a host's network, one way.
    int8: int8 products in the time of one in bf16.
    fp8: fp8 products in the time of one in bf16.
    devices_per_chip: devices that share the links of a chip.
    die_links: links equal in bandwidth to what joins the devices of one chip.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus_axes: int
  dcn_bandwidth: float
  int8: float = 2.0
  fp8: float = 1.0
  devices_per_chip: int = 1
  die_links: float = 1.0


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
      dcn_bandwidth=25 / 4 * _GB,
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
      dcn_bandwidth=25 / 8 * _GB,
    ),
    Chip(
      name="v5p",
      kinds=("TPU v5", "TPU v5p"),
      flops=459e12,
      hbm_bytes=95 * _GIB,
      hbm_bandwidth=2765 * _GB,
      link_bandwidth=90 * _GB,
      torus_axes=3,
      dcn_bandwidth=25 / 4 * _GB,
    ),
    Chip(
      name="v6e",
      kinds=("TPU v6 lite", "TPU v6e"),
      flops=918e12,
      hbm_bytes=32 * _GIB,
      hbm_bandwidth=1638 * _GB,
      link_bandwidth=90 * _GB,
      torus_axes=2,
      dcn_bandwidth=100 / 8 * _GB,
    ),
    Chip(
      name="tpu7x",
      kinds=("TPU7x",),
      flops=2307e12 / 2,
      hbm_bytes=192 / 2 * _GIB,
      hbm_bandwidth=7380 / 2 * _GB,
      link_bandwidth=90 * _GB,
      torus_axes=3,
      dcn_bandwidth=12.5 / 2 * _GB,
      int8=1.0,
      fp8=2.0,
      devices_per_chip=2,
      die_links=6.0,
    ),
    Chip(
      name="a100",
      kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
      flops=312e12,
      hbm_bytes=80 * _GIB,
      hbm_bandwidth=2039 * _GB,
      link_bandwidth=300 * _GB,
      torus_axes=1,
      dcn_bandwidth=200 / 8 * _GB,
    ),
    Chip(
      name="a100-40gb",
      kinds=("NVIDIA A100-SXM4-40GB",),
      flops=312e12,
      hbm_bytes=40 * _GIB,
      hbm_bandwidth=1555 * _GB,
      link_bandwidth=300 * _GB,
      torus_axes=1,
      dcn_bandwidth=200 / 8 * _GB,
    ),
    Chip(
      name="h100",
      kinds=("NVIDIA H100 80GB HBM3",),
      flops=989e12,
      hbm_bytes=80 * _GIB,
      hbm_bandwidth=3350 * _GB,
      link_bandwidth=450 * _GB,
      torus_axes=1,
      dcn_bandwidth=400 / 8 * _GB,
      fp8=2.0,
    ),
    Chip(
      name="h200",
      kinds=("NVIDIA H200",),
      flops=989e12,
      hbm_bytes=141e9,
      hbm_bandwidth=4800 * _GB,
      link_bandwidth=450 * _GB,
      torus_axes=1,
      dcn_bandwidth=400 / 8 * _GB,
      fp8=2.0,
    ),
  )
}

_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}


def of_device(device: jax.Device) -> Chip | None:
  """Returns the chip of a device, real or of a topology; None if unknown.

  CPUs are unknown: their peak depends on too much.
  """
  return _BY_KIND.get(device.device_kind)
