"""The report on a program that was compiled ahead of time."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
  """One program on one topology; sizes are of one JAX device, in bytes.

  A chip of TPU7x is two devices, of all others one. MFU is the same of both.

  Attributes:
    program: its name.
    topology: as `topology.devices` takes it.
    slices: of that topology.
    chips: all together.
    devices: all together.
    mesh: size of each axis.
    assumed: whether shapes are from config.assumed, not from model_dir.
    batch_size: of all devices together.
    tokens_per_device: in a step; images for stages without tokens.
    fits: whether it, and what is computed before its phase, fits the HBM.
    why_not: if it does not.
    unread: why XLA's program could not be read back; "" if it was.
    memory: see `_memory`.
    boundaries: of a step: the programs before its phase, each with its memory.
    warnings: about those.
    model_flops: by network, of all devices together.
    executed_flops: of one device.
    int8_flops: those of `executed_flops` that are of int8 arrays.
    fp8_flops: those of `executed_flops` that are of fp8 arrays.
    executed_over_model: FLOPs, of one device.
    collectives: by kind, dtype and group size, the largest first.
    kernels: names of Pallas kernels, one for each call.
    roofline: see `roofline.Roofline`.
    lower_s: seconds to trace and lower.
    compile_s: seconds to compile the program alone.
    versions: of the compiler.
  """

  program: str
  topology: str
  slices: int
  chips: int
  devices: int
  mesh: dict[str, int]
  assumed: bool
  batch_size: int
  tokens_per_device: float
  fits: bool
  why_not: str = ""
  unread: str = ""
  memory: dict[str, float] = dataclasses.field(default_factory=dict)
  boundaries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  warnings: list[str] = dataclasses.field(default_factory=list)
  model_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  executed_flops: float = 0.0
  int8_flops: float = 0.0
  fp8_flops: float = 0.0
  executed_over_model: float = 0.0
  collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  kernels: list[str] = dataclasses.field(default_factory=list)
  roofline: dict[str, float] = dataclasses.field(default_factory=dict)
  lower_s: float = 0.0
  compile_s: float = 0.0
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
