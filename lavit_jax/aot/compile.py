"""Compiles a config's programs ahead of time, for chips that are not there.

A report has what XLA says (memory, collectives) and what is computed from it
and the chip's table: executed and model FLOPs, the roofline.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections

from lavit_jax.aot import (
  collectives,
  executed,
  hlo,
  libtpu,
  report,
  roofline,
  serving,
  topology,
)
from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.cost import chips
from lavit_jax.train import boundaries, lowering, objectives, phases, ranges
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import artifacts
from lavit_jax.train.telemetry import flops

FULLEST = 0.95  # of a device's HBM: the rest is for the runtime
_READS = {  # parts that each stage reads from model_dir
  "tokenizer": ("encoder",),
  "pixels": ("encoder", "tokenizer"),
  "latents": ("encoder", "tokenizer"),
  "pretrain": ("encoder", "tokenizer"),
}


def objective_of(config: ml_collections.ConfigDict) -> base.Objective:
  """Builds the objective of a config, of shapes if parts are missing."""
  stored = checkpoints.parts_in(config.model_dir)
  if all(name in stored for name in _READS.get(config.stage, ())):
    return objectives.build(config)
  return objectives.build(config, artifacts.AbstractArtifacts(config))


def compile_for(
  config: ml_collections.ConfigDict,
  topology_name: str,
  *,
  slices: int = 1,
  program: str = "step",
  phase: str | None = None,
) -> tuple[report.Report, str]:
  """Compiles one program of a config for a TPU topology.

  With a step, the programs before its phase are compiled too.

  Args:
    config: see `configs/`.
    topology_name: such as "v5e:16x16".
    slices: number of them.
    program: "step", or one of `serving.PROGRAMS`.
    phase: whose step; by default the last phase's.

  Returns:
    The report, and the optimized HLO ("" if the program does not fit).

  Raises:
    errors.LavitError: the config, the mesh or the topology is wrong.
  """
  ranges.check(config)
  target = _Target.of(config, topology_name, slices)
  if program == "step":
    return _compile_step(target, phase_of(config, phase))
  start = time.monotonic()
  lowered, model = serving.lower(program, target.objective, target.mesh)
  lower_s = time.monotonic() - start
  return _compile_program(target, lowered, program, model, lower_s)


@dataclasses.dataclass(frozen=True)
class _Target:
  """A config and the devices that it is compiled for.

  Attributes:
    config: of the run.
    objective: of its stage.
    mesh: of the topology's devices.
    chip: of the topology.
    common: fields that every report for the target has.
  """

  config: ml_collections.ConfigDict
  objective: base.Objective
  mesh: jax.sharding.Mesh
  chip: chips.Chip
  common: dict[str, Any]

  @classmethod
  def of(
    cls, config: ml_collections.ConfigDict, topology_name: str, slices: int
  ) -> "_Target":
    """Builds the target of a config and a topology."""
    devices = topology.devices(topology_name, slices)
    chip = topology.chip_of(devices[0])
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    objective = objective_of(config)
    common = {
      "topology": topology_name,
      "slices": slices,
      "chips": len(devices) // chip.devices_per_chip,
      "devices": len(devices),
      "mesh": dict(mesh.shape),
      "assumed": objective.artifacts.is_abstract,
      "batch_size": config.batch_size,
      "tokens_per_device": _tokens(objective) / len(devices),
      "versions": libtpu.versions(),
    }
    return cls(config, objective, mesh, chip, common)


def _compile_step(
  target: _Target, phase: phases.Phase
) -> tuple[report.Report, str]:
  """Compiles the step of a phase, and the programs before the phase."""
  objective, mesh, start = target.objective, target.mesh, time.monotonic()
  lowered, (state, frozen, batch) = lowering.lower(
    objective, target.config, phase, mesh
  )
  lower_s = time.monotonic() - start
  next_batch = sharding.bytes_per_device(batch)
  step, text = _compile_program(
    target,
    lowered,
    f"step of {target.config.stage}/{phase.name}",
    flops.of_step(objective, phase),
    lower_s,
    waiting=next_batch,
  )
  if not step.memory:
    return step, text
  with sharding.use(mesh):
    programs = boundaries.lower(objective, phase, state, frozen, batch, mesh)
  reads = {boundaries.add_name(fold) for fold in objective.folds(phase)}
  compiled = [
    _compile_boundary(
      name, program, target.chip, next_batch if name in reads else 0.0
    )
    for name, program in programs.items()
  ]
  return _with_boundaries(step, compiled), text


def _with_boundaries(
  step: report.Report, compiled: list[dict[str, Any]]
) -> report.Report:
  """Adds the programs before a phase to the report of its step."""
  most = step.memory["total"]
  larger = [x for x in compiled if x["memory"].get("total", most + 1) > most]
  too_large = [x for x in compiled if not x["fits"]]
  reasons = "; ".join(f"{x['program']}: {x['why_not']}" for x in too_large)
  return dataclasses.replace(
    step,
    boundaries=compiled,
    warnings=[_warning(x, most) for x in larger],
    fits=step.fits and not too_large,
    why_not=step.why_not or reasons,
  )


def _compile_boundary(
  name: str,
  lowered: jax.stages.Lowered,
  chip: chips.Chip,
  waiting: float,
) -> dict[str, Any]:
  """Compiles a program that runs before a phase; returns its memory."""
  start, memory = time.monotonic(), {}
  try:
    memory = _memory(lowered.compile(), chip, waiting)
    fits, why_not = _fits(memory)
  except jax.errors.JaxRuntimeError as e:
    fits, why_not = False, _too_large(e)
  return {
    "program": name,
    "fits": fits,
    "why_not": why_not,
    "memory": memory,
    "compile_s": time.monotonic() - start,
  }


def _warning(boundary: Mapping[str, Any], step: float) -> str:
  """Warns of a program that takes more bytes than the step."""
  total = boundary["memory"].get("total")
  takes = f"takes {total / 1e9:.2f} GB" if total else "does not fit"
  return (
    f"{boundary['program']}, before the phase, {takes}; the step takes"
    f" {step / 1e9:.2f} GB"
  )


def _compile_program(
  target: _Target,
  lowered: jax.stages.Lowered,
  name: str,
  model_flops: dict[str, float],
  lower_s: float,
  waiting: float = 0.0,
) -> tuple[report.Report, str]:
  """Compiles a lowered program; returns (its report, its HLO)."""
  start = time.monotonic()
  common = target.common | {
    "program": name,
    "model_flops": model_flops,
    "lower_s": lower_s,
  }
  try:
    compiled, text, unread = _compile(lowered)
  except jax.errors.JaxRuntimeError as e:
    return report.Report(fits=False, why_not=_too_large(e), **common), ""
  common["compile_s"] = time.monotonic() - start
  memory = _memory(compiled, target.chip, waiting)
  fits, why_not = _fits(memory)
  common |= {"fits": fits, "why_not": why_not, "memory": memory}
  if unread:
    return report.Report(unread=unread, **common), ""
  return _report(common, text, target.chip, target.mesh), text


def _compile(
  lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled, str, str]:
  """Compiles; returns (compiled, its HLO, "" or why there is no HLO).

  The text is libtpu's own dump: jaxlib's reader is at times older than libtpu's
  format, and then prints a stack trace to stderr.
  """
  with tempfile.TemporaryDirectory() as folder:
    dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(dump)
    if files := list(pathlib.Path(folder).glob("*.after_optimizations.txt")):
      largest = max(files, key=lambda path: path.stat().st_size)
      return compiled, largest.read_text(), ""
  try:  # a program from the compilation cache leaves no dump
    return compiled, compiled.as_text() or "", ""
  except jax.errors.JaxRuntimeError as e:
    return compiled, "", " ".join(str(e).split())[:300]


def _fits(memory: Mapping[str, float]) -> tuple[bool, str]:
  """Returns whether a program fits, and why not."""
  share = memory["share"]
  if share <= FULLEST:
    return True, ""
  return False, f"{share:.0%} of a device's HBM, more than {FULLEST:.0%}"


def _report(
  common: dict[str, Any], text: str, chip: chips.Chip, mesh: jax.sharding.Mesh
) -> report.Report:
  """Reports what the HLO of a compiled program has."""
  program = hlo.read(text)
  done = executed.flops(program)
  int8, fp8 = executed.int8_flops(program), executed.fp8_flops(program)
  model = sum(common["model_flops"].values()) / common["devices"]
  sent = collectives.of_program(program)
  line = roofline.estimate(
    done,
    executed.hbm_bytes(program),
    sent,
    chip,
    model_flops=model,
    int8_flops=int8,
    fp8_flops=fp8,
    routes=topology.routes(mesh, chip),
  )
  return report.Report(
    executed_flops=done,
    int8_flops=int8,
    fp8_flops=fp8,
    executed_over_model=done / model,
    collectives=_grouped(sent),
    kernels=executed.kernels(program),
    roofline=dataclasses.asdict(line),
    **common,
  )


def _memory(
  compiled: Any, chip: chips.Chip, waiting: float = 0.0
) -> dict[str, float]:
  """Returns the HBM of one device by XLA's account, and of the next batch."""
  m = compiled.memory_analysis()
  parts = {
    "arguments": m.argument_size_in_bytes,
    # Without those that reuse an argument's buffer.
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
    "waiting": waiting,  # the next batch arrives while a step runs
  }
  total = sum(parts.values())
  return parts | {
    "host": m.host_temp_size_in_bytes,
    "total": total,
    "of": chip.hbm_bytes,
    "share": total / chip.hbm_bytes,
  }


def _grouped(
  sent: Iterable[collectives.Collective],
) -> list[dict[str, Any]]:
  """Sums collectives of one kind, dtype and group size, the largest first."""
  groups: dict[tuple, dict[str, Any]] = {}
  for one in sent:
    key = one.kind, one.dtype, one.group_size
    entry = groups.setdefault(
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
  return sorted(groups.values(), key=lambda entry: -entry["bytes"])


def phase_of(
  config: ml_collections.ConfigDict, name: str | None
) -> phases.Phase:
  """Returns the phase of a name; None for the last.

  Raises:
    errors.UsageError: the config has no such phase.
  """
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


def _tokens(objective: base.Objective) -> float:
  """Returns the tokens of a global step; images if a stage has no tokens."""
  batch = objective.batch_shapes()
  if "tokens" in batch:
    return float(batch["tokens"].size)
  return float(objective.config.batch_size)


def _too_large(error: Exception) -> str:
  """Returns XLA's words on memory in a line; raises errors of other kinds."""
  if "hbm" not in str(error).lower():
    raise error
  text = " ".join(str(error).split())
  match = re.search(r"Used [\d.]+[KMGT] of [\d.]+[KMGT] hbm[^.]*", text)
  return f"XLA: {match[0] if match else text[:300]}"
