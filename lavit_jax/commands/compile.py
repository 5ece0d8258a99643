"""The command `lavit compile`: compiles a run for TPUs, without any TPU."""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import common, train
from lavit_jax.core import errors

with epy.lazy_imports():  # after JAX_PLATFORMS is set, see `run`
  import jax

  from lavit_jax.aot import compile as ahead
  from lavit_jax.aot import libtpu
  from lavit_jax.models import layers
  from lavit_jax.train import phases

_HELP = """\
usage: lavit compile --config FILE --topology CHIP:SHAPE [options]
                     [--config.FIELD=VALUE ...]

Compile the exact training step of a config for a TPU topology, and the programs
that run before its phase begins, on any x86 Linux machine without a TPU (pip
install 'lavit_jax[tpu]'). Reports the memory of a device, the communication,
the FLOPs of the model and those executed, and the time of a step by the peak
numbers of the chip (a roofline, not a measurement). "Device" is meant as in
JAX: a chip, or one half of a TPU7x chip. Exit status 0: it fits; 3: it does
not.

  --config FILE          as of lavit train; its model_dir and data need not
                         exist (config.assumed then gives their sizes)
  --topology CHIP:SHAPE  v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, v5e:2x4,
                         ...; the shape is in chips
  --slices N             so many such slices, joined by the network
  --phase NAME           the phase of the step, by default the last one; all:
                         the step of every phase
  --program NAME         prefill or decode (stage pretrain), unet (latents), in
                         place of the training step
  --sweep                try half to four times the config's batch size, with
                         every remat policy; the best that fits comes last
  --batches B,B,...      with --sweep: these batch sizes
  --remats R,R,...       with --sweep: these policies of dots, full, ...
  --hlo FILE             write the optimized program to FILE; with --sweep, that
                         of the best
  --cache DIR            keep the compiled program in DIR, in the format of the
                         compilation cache of JAX. A run that finds it where
                         it looks for programs (lavit train --help) need not
                         compile. If chips, versions, code, config or shapes
                         differ, the run compiles as usual
  --libtpu PATH          compile with this libtpu.so, or the one in the folder
                         of pip install --target PATH --no-deps libtpu==VERSION.
                         By default TPU_LIBRARY_PATH, or the installed libtpu; a
                         warning says if jax[tpu] requires another version
  --json                 print one JSON document; with --phase all, a list
  --config.FIELD=VALUE   override any field of the config (after --config)

examples:
  lavit compile --config lavit_7b/pretrain.py --topology v5e:16x16
  lavit compile --config lavit_7b/finetune.py --topology v6e:2x4 \\
    --config.batch_size=64
  lavit compile --config lavit_7b/pretrain.py --topology v5p:4x4x8 --sweep
"""
DOES_NOT_FIT = 3
_REMATS = ("dots", "most", "attention", "full")


def add(subparsers: Any) -> None:
  """Lists the command in `lavit --help`; its own help text is above."""
  subparsers.add_parser(
    "compile", help="compile a run for a TPU topology: does it fit?"
  )


def run(argv: Sequence[str]) -> int:
  """Compiles a config for a topology and prints a report.

  Args:
    argv: the words after `lavit compile`.

  Returns:
    The exit status: 0, or DOES_NOT_FIT.

  Raises:
    errors.LavitError: what the user can mend: flags, config, libtpu.
  """
  if not argv or {"-h", "--help"} & set(argv):
    print(_HELP, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  args, config = _parse(argv)
  os.environ["JAX_PLATFORMS"] = "cpu"  # do not take a TPU of this machine
  keep_in(args.cache)
  libtpu.use(args.libtpu)
  if warning := libtpu.warning():
    print(f"lavit compile: {warning}", file=sys.stderr)

  def compile_one(config, phase=args.phase):
    return ahead.compile_for(
      config,
      args.topology,
      slices=args.slices,
      program=args.program,
      phase=phase,
    )

  if args.sweep:
    return _sweep(args, config, compile_one)
  if args.phase != "all":
    report, text = compile_one(config)
    _write_program(args, text)
    return _print_reports(args, [report])
  names = [phase.name for phase in phases.phases_of(config)]
  return _print_reports(args, [compile_one(config, n)[0] for n in names])


def _write_program(args, text) -> None:
  """Writes the program to the file of --hlo, if there are both."""
  if args.hlo and text:
    path = pathlib.Path(args.hlo)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _print_reports(args, reports) -> int:
  """Prints the reports and returns the exit status."""
  if args.json:
    documents = [dataclasses.asdict(report) for report in reports]
    document = documents if args.phase == "all" else documents[0]
    print(json.dumps(document, indent=2))
  else:
    print("\n\n".join(map(_table, reports)))
  return 0 if all(report.fits for report in reports) else DOES_NOT_FIT


def _parse(argv):
  """Returns the options of the command, and the config."""
  parser = argparse.ArgumentParser(
    prog="lavit compile", add_help=False, allow_abbrev=False
  )
  parser.add_argument("--topology")
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--phase")
  names = ("step", "prefill", "decode", "unet")
  parser.add_argument("--program", choices=names, default="step")
  parser.add_argument("--sweep", action="store_true")
  parser.add_argument("--batches")
  parser.add_argument("--remats")
  parser.add_argument("--hlo")
  parser.add_argument("--cache")
  parser.add_argument("--libtpu")
  parser.add_argument("--json", action="store_true")
  args, rest = parser.parse_known_args(argv)
  if not args.topology:
    raise errors.UsageError(
      "--topology CHIP:SHAPE is missing, such as v5e:16x16. See lavit compile"
      " --help."
    )
  if args.slices < 1:
    raise errors.UsageError(f"--slices {args.slices}: expected 1 or more.")
  _check_flags(args, rest)
  config, _ = train.read_config([*rest, "--workdir", "none"])
  return args, config


def _check_flags(args, rest) -> None:
  """Raises UsageError for flags that do not go together."""
  if args.hlo is not None:
    words = (word.partition("=")[2] or word for word in rest)
    common.require_not_read(args.hlo, "--hlo", words)
    is_program = lambda line: line.startswith("HloModule")
    common.require_report(args.hlo, "--hlo", is_program)
  if args.cache:
    common.require_output_folder(args.cache, "--cache")
  for flag in ("batches", "remats"):
    if getattr(args, flag) is not None and not args.sweep:
      raise errors.UsageError(
        f"--{flag} goes with --sweep: a sweep tries these values."
      )
  single = [f"--{x}" for x in ("hlo", "sweep") if getattr(args, x)]
  single += ["--program"] if args.program != "step" else []
  if args.phase == "all" and single:
    raise errors.UsageError(
      f"--phase all compiles several steps, but {single[0]} is for one program."
      " Give the name of a phase."
    )


def keep_in(folder: str | None) -> None:
  """Makes JAX keep compiled programs in a folder; None: nowhere.

  Programs for other chips cannot be read back on this machine. JAX warns of
  that, which is silenced here, and compiles again.
  """
  jax.config.update("jax_enable_compilation_cache", folder is not None)
  if folder is None:
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  warnings.filterwarnings(
    "ignore", message="Error reading persistent compilation cache"
  )


def _sweep(args, config, compile_one: Callable) -> int:
  """Compiles every combination, prints a line for each, then the best."""
  size = config.batch_size
  batches = _numbers(args.batches) or (size // 2, size, 2 * size, 4 * size)
  remats = tuple(args.remats.split(",")) if args.remats else _REMATS
  if unknown := set(remats) - set(layers.REMAT):
    raise errors.UsageError(
      f"--remats: {', '.join(sorted(unknown))}: expected some of"
      f" {', '.join(sorted(layers.REMAT))}."
    )
  results, best = [], None
  for batch, remat in itertools.product(batches, remats):
    variant = copy.deepcopy(config)
    variant.batch_size = batch
    _set_remat(variant.model, remat)
    report, text = compile_one(variant)
    results.append((report, batch, remat))
    print(_line(report, batch, remat), file=sys.stderr, flush=True)
    usable = report.fits and not report.unread
    if usable and (best is None or _mfu(report) > _mfu(best[0])):
      best = results[-1]
      _write_program(args, text)
  if args.json:
    rows = [
      {"batch_size": batch, "remat": remat} | dataclasses.asdict(report)
      for report, batch, remat in results
    ]
    print(json.dumps(rows, indent=2))
  elif best is None:
    print("none fits")
  else:
    report, batch, remat = best
    print(_table(report))
    print(f"best: --config.batch_size={batch}, remat {remat}")
  return 0 if best else DOES_NOT_FIT


def _mfu(report) -> float:
  return report.roofline["mfu_no_overlap"]


def _numbers(text) -> tuple[int, ...]:
  """Parses the value of --batches: "8,16" gives (8, 16), "" gives ()."""
  if not text:
    return ()
  try:
    return tuple(int(number) for number in text.split(","))
  except ValueError as e:
    raise errors.UsageError(f"--batches {text}: expected B,B,...") from e


def _set_remat(model, remat) -> None:
  """Sets the remat policy of every network that has one, frozen or not."""
  for name, part in model.items():
    if hasattr(part, "items"):
      _set_remat(part, remat)
    elif name == "remat":
      model[name] = remat


def _line(report, batch, remat) -> str:
  """Returns the line of one combination of a sweep."""
  start = f"batch {batch:>6}  remat {remat:<10}"
  if not report.fits:
    return f"{start} does not fit: {report.why_not}"
  if report.unread:
    return f"{start} {report.memory['share']:>4.0%} of HBM, program not read"
  bound = report.roofline
  return (
    f"{start} {report.memory['share']:>4.0%} of HBM  step"
    f" {bound['step_s']:.3f} to {bound['step_s_no_overlap']:.3f} s  MFU"
    f" {bound['mfu_no_overlap']:.0%} to {bound['mfu']:.0%}"
  )


def _table(report) -> str:
  """Returns the report as text."""
  lines = _head(report)
  if not report.memory:
    return "\n".join([*lines, f"DOES NOT FIT: {report.why_not}"])
  lines += _sizes(report)
  if report.unread:
    lines.append(f"XLA's program cannot be read back: {report.unread}")
    return "\n".join([*lines, _end(report)])
  lines += [
    f"executed FLOPs: {report.executed_over_model:.2f} x model"
    + _low_precision_shares(report),
    f"kernels: {', '.join(report.kernels) or 'none'}",
    "sent and received per step and device:",
    *map(_collective, report.collectives[:8]),
    *_bounds(report.roofline),
    f"compiled in {report.compile_s:.0f} s",
    _end(report),
  ]
  return "\n".join(lines)


def _collective(row) -> str:
  """Returns the line of one kind of communication."""
  return (
    f"  {row['kind']:<18} {row['dtype']:<5} groups of {row['group_size']:<5}"
    f" {row['times']:>6} times  {_gb(row['bytes'])}"
  )


def _bounds(roofline) -> list[str]:
  """Returns the lower bounds on the time of a step, in seconds."""
  line = roofline
  return [
    f"at best: compute {line['compute_s']:.3f} s, HBM {line['hbm_s']:.3f} s,"
    f" ICI {line['ici_s']:.3f} s",
    f"  a step {line['step_s']:.3f} s if all overlap (MFU {line['mfu']:.0%}),"
    f" {line['step_s_no_overlap']:.3f} s if nothing does (MFU"
    f" {line['mfu_no_overlap']:.0%})",
  ]


def _gb(size) -> str:
  return f"{size / 1e9:.2f} GB"


def _head(report) -> list[str]:
  """Returns the program, the topology, the batch and the versions."""
  mesh = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1)
  per_chip = report.devices // report.chips
  return [
    f"{report.program} on {report.topology}"
    + (f" x {report.slices} slices" if report.slices > 1 else "")
    + f", {report.chips} chips"
    + (f" of {per_chip} devices" if per_chip > 1 else "")
    + f" ({mesh or 'one chip'})",
    f"batch {report.batch_size}, {report.tokens_per_device:,.0f} tokens (or"
    " images) per device"
    + ("; sizes from config.assumed" if report.assumed else ""),
    f"jax {report.versions['jax']}, libtpu"
    f" {report.versions['libtpu'] or 'of unknown version'}",
  ]


def _sizes(report) -> list[str]:
  """Returns the memory of all programs, and the FLOPs of the model."""
  m = report.memory
  total = sum(report.model_flops.values())
  shares = ", ".join(
    f"{name} {value / total:.0%}" for name, value in report.model_flops.items()
  )
  return [
    f"HBM per device: {_gb(m['total'])} of {_gb(m['of'])} ({m['share']:.0%}):"
    f" arguments {_gb(m['arguments'])}, temporaries {_gb(m['temporaries'])},"
    f" outputs {_gb(m['outputs'])}, code {_gb(m['code'])}, the next batch"
    f" {_gb(m['waiting'])}"
    + (f"; on the host {_gb(m['host'])}" if m["host"] else ""),
    *map(_boundary, report.boundaries),
    f"model FLOPs per step: {total:.4g} ({shares})",
  ]


def _boundary(row) -> str:
  """Returns the line of one program that runs before the phase."""
  memory = row["memory"]
  need = (
    f"{_gb(memory['total'])} ({memory['share']:.0%})"
    if memory
    else row["why_not"]
  )
  return f"  before the phase, {row['program']}: {need}"


def _low_precision_shares(report) -> str:
  """Returns the shares of the executed FLOPs that are int8 or fp8."""
  flops = {"int8": report.int8_flops, "fp8": report.fp8_flops}
  shares = {k: v / report.executed_flops for k, v in flops.items() if v}
  return "".join(f", {v:.0%} in {k}" for k, v in shares.items())


def _end(report) -> str:
  """Returns the warnings and the verdict."""
  verdict = "fits" if report.fits else f"DOES NOT FIT: {report.why_not}"
  return "\n".join([*(f"WARNING: {x}" for x in report.warnings), verdict])
