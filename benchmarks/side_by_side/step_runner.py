"""Compares and times one kind of training step; see the two scripts of it."""

import argparse
import functools
import json
import pathlib
import sys
import tempfile

import pytorch_side_by_side as common

from side_by_side import report, worker

MODULES = {"torch": "steps_torch", "ours": "steps_ours"}


def main(doc: str, full, small, *, batch: int, apart: float, argv=None) -> int:
  """Runs a script; the exit status, 1 where the losses differ.

  Args:
    doc: the script's own, shown as help.
    full: sizes, `steps.Llama` or `steps.Tokenizer`.
    small: the same as a toy.
    batch: rows by default.
    apart: how far losses may be apart.
    argv: arguments; of the process by default.
  """
  args = _arguments(doc, batch, argv)
  with tempfile.TemporaryDirectory() as folder:
    found = run(args, folder, small if args.small else full, apart)
  if found is None:
    print("PyTorch and lavit_jax have other losses: nothing was timed.")
    return 1
  if args.json:
    print(json.dumps(found, indent=1))
  else:
    print(f"\n{report.table(found)}")
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
  return 0


def _arguments(doc, batch, argv):
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--small", action="store_true", help="a toy, in seconds")
  parser.add_argument("--batch", type=int, default=batch, help=f"({batch})")
  parser.add_argument("--repeats", type=int, default=5, help="(5)")
  parser.add_argument("--threads", type=int, default=2, help="(2)")
  parser.add_argument("--profile", metavar="DIR")
  args = parser.parse_args(argv)
  if args.repeats < 1 or args.threads < 1 or args.batch < 1:
    parser.error("--repeats, --threads and --batch: expected 1 or more.")
  return args


def run(args, folder, sizes, apart: float, device: str = "cpu") -> dict | None:
  """The report, or None where the losses differ; `device` as of a Worker."""
  say = functools.partial(print, file=sys.stderr if args.json else sys.stdout)
  case = sizes.case()
  parameters = worker.apart("steps_ours.make", folder, sizes)
  say(f"{parameters / 1e6:.1f} M parameters train", flush=True)
  workers = {
    name: worker.Worker(name, folder, sizes, args.threads, MODULES, device)
    for name in MODULES
  }
  losses, firsts = {}, {}
  for name, one in workers.items():
    seconds, arrays = one.ask("first", case, args.batch)
    firsts[case.name, args.batch, name] = seconds
    losses[name] = [arrays["loss"], *one.ask("judged", case, args.batch)]
  differ = max(
    abs(a - b) / max(abs(b), 1.0)
    for a, b in zip(losses["ours"], losses["torch"], strict=True)
  )
  say(f"losses {losses['ours']} here: at most {differ:.0e} apart", flush=True)
  if not differ <= apart:
    say(f"PyTorch: {losses['torch']}", flush=True)
    return None
  found = report.origin(args.threads) | {
    "parameters": parameters,
    "small": args.small,
    "repeats": args.repeats,
    "losses": losses,
  }
  todo = [(case, args.batch)]
  found["rows"] = common.measure(todo, workers, firsts, args.repeats, say)
  if args.profile:
    folder = pathlib.Path(args.profile)
    common.profile(todo, workers, args.repeats, folder)
  found["about"] = {name: one.ask("about") for name, one in workers.items()}
  for one in workers.values():
    found["versions"] |= one.ask("versions")
    one.close()
  return found
