"""Ahead of time: the exact step of a config, compiled for chips not there.

What comes back is what XLA says (memory, collectives) and what is computed
from it and from the chip's table: executed and model FLOPs, the roofline.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from lavit_jax.aot import (
  collectives,
  executed,
  hlo,
  libtpu,
  roofline,
  serving,
  topology,
)
from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.cost import chips
from lavit_jax.train import boundaries, lowering, objectives, phases, ranges
from lavit_jax.train.objectives.frozen import artifacts
from lavit_jax.train.telemetry import flops

FULLEST = 0.95  # of a device's HBM: the rest is for the runtime
_NEEDS = {  # parts that each stage reads from model_dir
  "tokenizer": ("encoder",),
  "pixels": ("encoder", "tokenizer"),
  "latents": ("encoder", "tokenizer"),
  "pretrain": ("encoder", "tokenizer"),
}


@dataclasses.dataclass(frozen=True)
class Report:
  """One program on one topology; sizes are of one JAX device, in bytes.

  A chip of TPU7x is two devices, of all others one. MFU is the same of both.
  """

  program: str
  topology: str
  slices: int
  chips: int
  devices: int
  mesh: dict[str, int]
  assumed: bool  # shapes from config.assumed, not from model_dir
  batch_size: int
  tokens_per_device: float
  fits: bool
  why_not: str = ""
  unread: str = ""  # why XLA's program could not be read back
  memory: dict[str, float] = dataclasses.field(default_factory=dict)
  # Of a step: what is computed before its phase, each with its memory.
  boundaries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  warnings: list[str] = dataclasses.field(default_factory=list)
  model_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  executed_flops: float = 0.0  # of one device
  int8_flops: float = 0.0  # of these
  fp8_flops: float = 0.0  # of these
  executed_over_model: float = 0.0
  collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  kernels: list[str] = dataclasses.field(default_factory=list)
  roofline: dict[str, float] = dataclasses.field(default_factory=dict)
  lower_s: float = 0.0
  compile_s: float = 0.0  # of the program alone
  versions: dict[str, str] = dataclasses.field(default_factory=dict)


def objective_of(config):
  """The objective of a config, by shapes where its parts are not there."""
  there = checkpoints.parts_in(config.model_dir)
  if all(name in there for name in _NEEDS.get(config.stage, ())):
    return objectives.build(config)
  return objectives.build(config, artifacts.AbstractArtifacts(config))


def compile_for(
  config,
  topology_name: str,
  *,
  slices: int = 1,
  what: str = "step",
  phase: str | None = None,
) -> tuple[Report, str]:
  """Compiles one program of a config for a TPU topology.

  With a step, what is computed before its phase is compiled too.

  Args:
    config: see `configs/`.
    topology_name: "v5e:16x16".
    slices: how many of them.
    what: "step", or one of `serving.PROGRAMS`.
    phase: whose step; by default the last.

  Returns:
    The report, and the optimized HLO ("" if it does not fit).

  Raises:
    errors.LavitError: the config, the mesh or the topology is wrong.
  """
  ranges.check(config)
  target = _Target.of(config, topology_name, slices)
  if what == "step":
    return _step(target, phase_of(config, phase))
  start = time.monotonic()
  lowered, model = serving.lower(what, target.objective, target.mesh)
  return _program(target, lowered, what, model, time.monotonic() - start)


@dataclasses.dataclass(frozen=True)
class _Target:
  """A config and the devices that it is compiled for."""

  config: Any
  objective: Any
  mesh: jax.sharding.Mesh
  chip: chips.Chip
  told: dict[str, Any]  # what every report of it has

  @classmethod
  def of(cls, config, topology_name, slices):
    devices = topology.devices(topology_name, slices)
    chip = topology.chip_of(devices[0])
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    objective = objective_of(config)
    told = {
      "topology": topology_name,
      "slices": slices,
      "chips": len(devices) // chip.devices_per_chip,
      "devices": len(devices),
      "mesh": dict(mesh.shape),
      "assumed": objective.stored.outline,
      "batch_size": config.batch_size,
      "tokens_per_device": _tokens(objective) / len(devices),
      "versions": libtpu.versions(),
    }
    return cls(config, objective, mesh, chip, told)


def _step(target, phase) -> tuple[Report, str]:
  """The step of a phase, and what is computed before it."""
  objective, mesh, start = target.objective, target.mesh, time.monotonic()
  lowered, given = lowering.lower(objective, target.config, phase, mesh)
  next_batch = sharding.bytes_a_device(given[-1])
  report, text = _program(
    target,
    lowered,
    f"step of {target.config.stage}/{phase.name}",
    flops.of_step(objective, phase),
    time.monotonic() - start,
    waiting=next_batch,
  )
  if not report.memory:
    return report, text
  with sharding.use(mesh):
    before = boundaries.lower(objective, phase, *given, mesh)
  reads = {boundaries.each(fold) for fold in objective.folds(phase)}
  made = [
    _boundary(name, x, target.chip, next_batch if name in reads else 0.0)
    for name, x in before.items()
  ]
  most = report.memory["total"]
  over = [one for one in made if one["memory"].get("total", most + 1) > most]
  bad = [one for one in made if not one["fits"]]
  return dataclasses.replace(
    report,
    boundaries=made,
    warnings=[_more(one, most) for one in over],
    fits=report.fits and not bad,
    why_not=report.why_not
    or "; ".join(f"{one['program']}: {one['why_not']}" for one in bad),
  ), text


def _boundary(name, lowered, chip, waiting) -> dict[str, Any]:
  """What XLA says of a program that runs before a phase."""
  start, memory = time.monotonic(), {}
  try:
    memory = _memory(lowered.compile(), chip, waiting)
    fits, why = _fits(memory)
  except jax.errors.JaxRuntimeError as e:
    fits, why = False, _too_large(e)
  return {
    "program": name,
    "fits": fits,
    "why_not": why,
    "memory": memory,
    "compile_s": time.monotonic() - start,
  }


def _more(one, most) -> str:
  """That a program takes more than the step."""
  total = one["memory"].get("total")
  takes = f"takes {total / 1e9:.2f} GB" if total else "does not fit"
  return (
    f"{one['program']}, before the phase, {takes}; the step takes"
    f" {most / 1e9:.2f} GB"
  )


def _program(
  target, lowered, name, model, lower_s, waiting=0.0
) -> tuple[Report, str]:
  """Compiles a lowered program; (its report, its HLO)."""
  start = time.monotonic()
  common = target.told | {
    "program": name,
    "model_flops": model,
    "lower_s": lower_s,
  }
  try:
    compiled, text, unread = _compiled(lowered)
  except jax.errors.JaxRuntimeError as e:
    return Report(fits=False, why_not=_too_large(e), **common), ""
  common["compile_s"] = time.monotonic() - start
  if unread:
    memory = _memory(compiled, target.chip, waiting)
    fits, why = _fits(memory)
    report = Report(
      fits=fits, why_not=why, unread=unread, memory=memory, **common
    )
    return report, ""
  memory = _memory(compiled, target.chip, waiting)
  return _report(common, memory, text, target.chip, target.mesh), text


def _compiled(lowered):
  """Compiles, and gives (compiled, its HLO, "" or why there is none).

  The text is libtpu's own dump: jaxlib's reader is at times behind what libtpu
  writes, and then fills stderr with a stack trace.
  """
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(dump)
    if found := list(pathlib.Path(folder).glob("*.after_optimizations.txt")):
      largest = max(found, key=lambda path: path.stat().st_size)
      return compiled, largest.read_text(), ""
  try:  # a program out of the compilation cache leaves no dump
    return compiled, compiled.as_text(), ""
  except jax.errors.JaxRuntimeError as e:
    return compiled, "", " ".join(str(e).split())[:300]


def _fits(memory) -> tuple[bool, str]:
  """Whether a program fits, and why not."""
  share = memory["share"]
  if share <= FULLEST:
    return True, ""
  return False, f"{share:.0%} of a device's HBM, more than {FULLEST:.0%}"


def _report(common, memory, text, chip: chips.Chip, mesh) -> Report:
  """What a compiled program says of itself."""
  read = hlo.read(text)
  done = executed.flops(read)
  int8, fp8 = executed.int8_flops(read), executed.fp8_flops(read)
  model = sum(common["model_flops"].values()) / common["devices"]
  sent = collectives.of_program(read)
  line = roofline.estimate(
    done,
    executed.hbm_bytes(read),
    sent,
    chip,
    model_flops=model,
    int8_flops=int8,
    fp8_flops=fp8,
    routes=topology.routes(mesh, chip),
  )
  fits, why = _fits(memory)
  return Report(
    fits=fits,
    why_not=why,
    memory=memory,
    executed_flops=done,
    int8_flops=int8,
    fp8_flops=fp8,
    executed_over_model=done / model,
    collectives=_summed(sent),
    kernels=executed.kernels(read),
    roofline=dataclasses.asdict(line),
    **common,
  )


def _memory(compiled, chip: chips.Chip, waiting=0.0) -> dict[str, float]:
  """HBM of one device by XLA's account, and the batch that waits its turn."""
  m = compiled.memory_analysis()
  fresh = m.output_size_in_bytes - m.alias_size_in_bytes
  parts = {
    "arguments": m.argument_size_in_bytes,
    "outputs": fresh,  # those that do not take an argument's place
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
    "waiting": waiting,  # the next batch comes while a step runs
  }
  total = sum(parts.values())
  return parts | {
    "host": m.host_temp_size_in_bytes,
    "total": total,
    "of": chip.hbm_bytes,
    "share": total / chip.hbm_bytes,
  }


def _summed(sent) -> list[dict[str, Any]]:
  """Collectives of one kind, dtype and group together, the largest first."""
  made: dict[tuple, dict[str, Any]] = {}
  for one in sent:
    key = one.kind, one.dtype, one.group_size
    entry = made.setdefault(
      key,
      {
        "kind": one.kind,
        "dtype": one.dtype,
        "group_size": one.group_size,
        "times": 0,
        "bytes": 0.0,
      },
    )
    entry["times"] += one.times
    entry["bytes"] += one.bytes * one.times
  return sorted(made.values(), key=lambda entry: -entry["bytes"])


def phase_of(config, name):
  """The phase of a name, or the last."""
  found = phases.phases_of(config)
  if name is None:
    return found[-1]
  for phase in found:
    if phase.name == name:
      return phase
  raise errors.UsageError(
    f"--phase {name}: the config's phases are"
    f" {', '.join(phase.name for phase in found)}."
  )


def _tokens(objective) -> float:
  """Tokens of a global step; images where a stage has no tokens."""
  batch = objective.batch_shapes()
  if "tokens" in batch:
    return batch["tokens"].size
  return float(objective.config.batch_size)


def _too_large(error) -> str:
  """What XLA says of memory, in a line; raises an error of another kind."""
  if "hbm" not in str(error).lower():
    raise error
  text = " ".join(str(error).split())
  match = re.search(r"Used [\d.]+[KMGT] of [\d.]+[KMGT] hbm[^.]*", text)
  return f"XLA: {match[0] if match else text[:300]}"
