"""The command that shows how a run went: report."""

import argparse

from lavit_jax.commands import common
from lavit_jax.core.storage import files

_FILE = "report.html"


def add(subparsers) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = common.command(
    subparsers,
    "report",
    _report,
    "show how a training run went, on one page",
    """\
    One HTML file that needs nothing beside it: losses of training and held-out
    data, where the time went, tokens a second, MFU, goodput, memory,
    checkpoints, images of evaluations, and the config. It reads files alone,
    so it can be written while the run goes on.

    MFU is the share of the chips' peak that the model's own products would
    take, padding and recomputation left out; it is missing on CPUs. Goodput is
    the share of the time since the first start that went into steps which were
    kept.

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
  from lavit_jax.evaluate.report import run_page

  out = args.out or files.place(args.workdir) / _FILE
  path = run_page.write(args.workdir, out)
  found = run_page.report(files.place(args.workdir))
  document = {
    "report": str(path),
    "facts": dict(found.facts),
    "metrics": {metric.name: metric.value for metric in found.metrics},
  }
  lines = [
    f"{name}: {value:.4g}" for name, value in document["metrics"].items()
  ]
  common.print_answer(args, document, [*lines, f"report: {path}"])
