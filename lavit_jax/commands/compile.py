"""The command that compiles a run for TPUs that are not there: compile."""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

from lavit_jax.commands import train
from lavit_jax.core import errors
from lavit_jax.core.storage import files

_HELP = """\
usage: lavit compile --config FILE --topology CHIP:SHAPE [options]
                     [--config.FIELD=VALUE ...]

Compile the exact training step of a config for a TPU topology, and what is
computed before its phase begins, on any x86 Linux machine, no TPU needed (pip
install 'lavit_jax[tpu]'). Says what a device's memory holds, what is sent, how
many FLOPs are model and how many are executed, and what the chip's own figures
make of it at best (a roofline, not a measurement). A device is what JAX calls
so: a chip, but for TPU7x, whose chips are two devices each. Exit status 0: it
fits; 3: it does not.

  --config FILE          as of lavit train; its model_dir and data need not be
                         there (then config.assumed says their sizes)
  --topology CHIP:SHAPE  v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, v5e:2x4,
                         ...; the shape is in chips
  --slices N             that many of them, joined by the network
  --phase NAME           whose step; the last phase by default. all: of every
                         phase, one after the other
  --program NAME         prefill or decode (stage pretrain), unet (latents), in
                         place of the training step
  --sweep                try batches of half to four times the config's, and
                         every remat policy; the best that fits comes last
  --batches B,B,...      with --sweep: these batch sizes
  --remats R,R,...       with --sweep: these policies of dots, full, ...
  --hlo FILE             write the optimized program there; with --sweep, that
                         of the best
  --cache DIR            keep the compiled program there, in the form of JAX's
                         compilation cache: put where a run looks for programs
                         (lavit train --help), it saves the run the time to
                         compile. Where chips, versions, code, config or shapes
                         are not the same, the run compiles as ever
  --libtpu PATH          compile with this libtpu.so, or that of the folder of
                         pip install --target PATH --no-deps libtpu==VERSION.
                         By default TPU_LIBRARY_PATH, or the installed one,
                         which should be the one that jax[tpu] asks for: a line
                         on stderr says so if it is not
  --json                 print one JSON document; with --phase all, a list
  --config.FIELD=VALUE   override any field of the config (after --config)

examples:
  lavit compile --config lavit_7b/pretrain.py --topology v5e:16x16
  lavit compile --config lavit_7b/finetune.py --topology v6e:2x4 \\
    --config.batch_size=64
  lavit compile --config lavit_7b/pretrain.py --topology v5p:4x4x8 --sweep
"""
DOES_NOT_FIT = 3
_REMATS = ("dots", "attention", "full")


def add(subparsers) -> None:
  """Names the command in `lavit --help`; its own words are above."""
  subparsers.add_parser(
    "compile", help="compile a run for a TPU topology: does it fit?"
  )


def run(argv: Sequence[str]) -> int:
  """Compiles, prints what came of it; exit status."""
  if not argv or {"-h", "--help"} & set(argv):
    print(_HELP, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  args, config = _read(argv)
  os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is there is left alone
  keep_in(args.cache)
  from lavit_jax.aot import compile as ahead
  from lavit_jax.aot import libtpu
  from lavit_jax.train import phases

  libtpu.use(args.libtpu)
  if warning := libtpu.warning():
    print(f"lavit compile: {warning}", file=sys.stderr)

  def one(config, phase=args.phase):
    return ahead.compile_for(
      config,
      args.topology,
      slices=args.slices,
      what=args.program,
      phase=phase,
    )

  if args.sweep:
    return _sweep(args, config, one)
  if args.phase != "all":
    report, text = one(config)
    _write_program(args, text)
    return _told(args, [report])
  steps = phases.phases_of(config)
  return _told(args, [one(config, step.name)[0] for step in steps])


def _write_program(args, text) -> None:
  """To the file of --hlo, if it was given and there is a program."""
  if args.hlo and text:
    pathlib.Path(args.hlo).write_text(text)


def _told(args, reports) -> int:
  """Prints reports; exit status."""
  made = [dataclasses.asdict(report) for report in reports]
  if args.json:
    print(json.dumps(made if args.phase == "all" else made[0], indent=2))
  else:
    print("\n\n".join(map(_table, reports)))
  return 0 if all(report.fits for report in reports) else DOES_NOT_FIT


def _read(argv):
  """The options of the command, and the config."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
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
  files.require_local(args.hlo or "", "a program")
  for flag in ("batches", "remats"):
    if getattr(args, flag) is not None and not args.sweep:
      raise errors.UsageError(
        f"--{flag} goes with --sweep: it is what a sweep tries."
      )
  one = [f"--{x}" for x in ("hlo", "sweep") if getattr(args, x)]
  if args.phase == "all" and (one or args.program != "step"):
    raise errors.UsageError(
      f"--phase all is of several steps, but {(one or ['--program'])[0]} of one"
      " program. Give the name of a phase."
    )
  config, _ = train.read_config([*rest, "--workdir", "none"])
  return args, config


def keep_in(folder) -> None:
  """Has JAX keep what it compiles in a folder, or nothing if it is None.

  What is kept for other chips cannot be read back here: JAX warns of that, and
  compiles again.
  """
  import jax

  jax.config.update("jax_enable_compilation_cache", folder is not None)
  if folder is None:
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  warnings.filterwarnings(
    "ignore", message="Error reading persistent compilation cache"
  )


def _sweep(args, config, one) -> int:
  """Compiles every choice, says of each what came of it; the best at last."""
  size = config.batch_size
  batches = _numbers(args.batches) or (size // 2, size, 2 * size, 4 * size)
  remats = tuple(args.remats.split(",")) if args.remats else _REMATS
  found, best = [], None
  for batch, remat in itertools.product(batches, remats):
    tried = copy.deepcopy(config)
    tried.batch_size = batch
    _set_remat(tried.model, remat)
    report, text = one(tried)
    found.append((report, batch, remat))
    print(_line(report, batch, remat), file=sys.stderr, flush=True)
    good = report.fits and not report.unread
    if good and (best is None or _mfu(report) > _mfu(best[0])):
      best = found[-1]
      _write_program(args, text)
  if args.json:
    rows = [
      {"batch_size": batch, "remat": remat} | dataclasses.asdict(report)
      for report, batch, remat in found
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


def _numbers(text):
  if not text:
    return ()
  try:
    return tuple(int(number) for number in text.split(","))
  except ValueError as e:
    raise errors.UsageError(f"--batches {text}: expected B,B,...") from e


def _set_remat(model, remat):
  """Sets the policy of every network that has one, frozen ones too."""
  for name, part in model.items():
    if hasattr(part, "items"):
      _set_remat(part, remat)
    elif name == "remat":
      model[name] = remat


def _line(report, batch, remat) -> str:
  start = f"batch {batch:>6}  remat {remat:<10}"
  if not report.fits:
    return f"{start} does not fit: {report.why_not}"
  line = report.roofline
  if report.unread:
    return f"{start} {report.memory['share']:>4.0%} of HBM, program not read"
  return (
    f"{start} {report.memory['share']:>4.0%} of HBM  step"
    f" {line['step_s']:.3f} to {line['step_s_no_overlap']:.3f} s  MFU"
    f" {line['mfu_no_overlap']:.0%} to {line['mfu']:.0%}"
  )


def _table(report) -> str:
  """The report for people."""
  lines = _head(report)
  if not report.memory:
    return "\n".join([*lines, f"DOES NOT FIT: {report.why_not}"])
  lines += _sizes(report)
  if report.unread:
    lines.append(f"XLA's program cannot be read back: {report.unread}")
    return "\n".join([*lines, _end(report)])
  line = report.roofline
  lines += [
    f"executed FLOPs: {report.executed_over_model:.2f} x model"
    + _narrow(report),
    f"kernels: {', '.join(report.kernels) or 'none'}",
    "sent and received a step, a device:",
  ]
  for one in report.collectives[:8]:
    lines.append(
      f"  {one['kind']:<18} {one['dtype']:<5} groups of {one['group_size']:<5}"
      f" {one['times']:>6} times  {_gb(one['bytes'])}"
    )
  lines += [
    f"at best: compute {line['compute_s']:.3f} s, HBM {line['hbm_s']:.3f} s,"
    f" ICI {line['ici_s']:.3f} s",
    f"  a step {line['step_s']:.3f} s if all overlap (MFU {line['mfu']:.0%}),"
    f" {line['step_s_no_overlap']:.3f} s if nothing does (MFU"
    f" {line['mfu_no_overlap']:.0%})",
    f"compiled in {report.compile_s:.0f} s",
    _end(report),
  ]
  return "\n".join(lines)


def _gb(size) -> str:
  return f"{size / 1e9:.2f} GB"


def _head(report) -> list[str]:
  """What was compiled, for what, by what."""
  mesh = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1)
  per_chip = report.devices // report.chips
  return [
    f"{report.program} on {report.topology}"
    + (f" x {report.slices} slices" if report.slices > 1 else "")
    + f", {report.chips} chips"
    + (f" of {per_chip} devices" if per_chip > 1 else "")
    + f" ({mesh or 'one chip'})",
    f"batch {report.batch_size}, {report.tokens_per_device:,.0f} tokens (or"
    " images) a device"
    + ("; sizes from config.assumed" if report.assumed else ""),
    f"jax {report.versions['jax']}, libtpu"
    f" {report.versions['libtpu'] or 'of unknown version'}",
  ]


def _sizes(report) -> list[str]:
  """Memory, of the step and of what runs before its phase; model FLOPs."""
  m = report.memory
  whole = sum(report.model_flops.values())
  shares = ", ".join(
    f"{name} {value / whole:.0%}" for name, value in report.model_flops.items()
  )
  return [
    f"HBM a device: {_gb(m['total'])} of {_gb(m['of'])} ({m['share']:.0%}):"
    f" arguments {_gb(m['arguments'])}, temporaries {_gb(m['temporaries'])},"
    f" outputs {_gb(m['outputs'])}, code {_gb(m['code'])}, the next batch"
    f" {_gb(m['waiting'])}"
    + (f"; on the host {_gb(m['host'])}" if m["host"] else ""),
    *map(_boundary, report.boundaries),
    f"model FLOPs a step: {whole:.4g} ({shares})",
  ]


def _boundary(one) -> str:
  """A line of what runs before the phase."""
  memory = one["memory"]
  takes = (
    f"{_gb(memory['total'])} ({memory['share']:.0%})"
    if memory
    else one["why_not"]
  )
  return f"  before the phase, {one['program']}: {takes}"


def _narrow(report) -> str:
  """Shares of the executed FLOPs that are in narrow formats."""
  done = {"int8": report.int8_flops, "fp8": report.fp8_flops}
  shares = {k: v / report.executed_flops for k, v in done.items() if v}
  return "".join(f", {v:.0%} in {k}" for k, v in shares.items())


def _end(report) -> str:
  """The verdict, after what is odd."""
  verdict = "fits" if report.fits else f"DOES NOT FIT: {report.why_not}"
  return "\n".join([*(f"WARNING: {x}" for x in report.warnings), verdict])
