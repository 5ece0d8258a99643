"""The command `lavit report`: a training run on one HTML page."""

import argparse
from typing import Any

from etils import epy

from lavit_jax.commands import common
from lavit_jax.core.storage import files

with epy.lazy_imports():
  from lavit_jax.evaluate.report import run_page

_FILE = "report.html"


def add(subparsers: Any) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = common.command(
    subparsers,
    "report",
    _report,
    "show how a training run went, on one page",
    """\
    Writes one self-contained HTML file: losses of training and held-out data,
    where the time went, tokens per second, MFU, goodput, memory, checkpoints,
    images of evaluations, and the config. The command only reads files, so it
    can be used while the run is still going.

    MFU is the share of the chips' peak that the model's own matrix products
    would take, without padding and recomputation; it is missing on CPUs.
    Goodput is the share of the time since the first start that went into steps
    which were kept.

    examples:
      lavit report runs/tiny/pretrain
      lavit report runs/pretrain --out /tmp/pretrain.html
      lavit report runs/pretrain --json         the last numbers alone
    """,
  )
  parser.add_argument(
    "workdir", metavar="WORKDIR", help="the --workdir of a `lavit train`"
  )
  parser.add_argument(
    "--out", metavar="FILE", help=f"where to write it (WORKDIR/{_FILE})"
  )


def _report(args: argparse.Namespace) -> None:
  workdir = files.input_path(args.workdir)
  if args.out is not None and not files.is_remote(args.out):
    common.require_report(args.out, "--out", common.is_page)
  path = run_page.write(args.workdir, args.out or workdir / _FILE)
  summary = run_page.report(workdir)
  metrics = {metric.name: metric.value for metric in summary.metrics}
  document = {
    "report": str(path),
    "facts": dict(summary.facts),
    "metrics": metrics,
  }
  lines = [f"{name}: {value:.4g}" for name, value in metrics.items()]
  common.print_answer(args, document, [*lines, f"report: {path}"])
