"""Reading, drawing and tokenizing, timed side by side with PyTorch.

  python benchmarks/pytorch_side_by_side.py [--out times.json]
  python benchmarks/pytorch_side_by_side.py --side ours --only draw --profile P

One model of random weights, made here, exported with `lavit port export` and
loaded by transformers and by a plain PyTorch tokenizer: the same weights, the
same work, float32, as many threads (2), a process for each side. First both
must compute the same: ids of beams, greedy guided ids, keep masks and codes;
if they do not, the exit status is 1 and nothing is timed. Then they run in
turn, A B A B, and medians are printed. Inputs and outputs are numpy arrays.

  caption      87 continuous tokens, 2 beams, 36 new tokens
  vqa          100 continuous tokens, 5 beams, 10 new tokens, length penalty 0
  draw         20 ids and [IMG], guidance 4 (two streams), 85 new tokens, top-k
               50, text suppressed
  tokenize     images 224 x 224 to codes, a third of 256 patches kept; ours
               twice: with the official merger, and in the compact form of
               models trained here. PyTorch's is the official one both times.
  first_token  the prompts of caption and draw, one new token

Every row writes all its tokens (the end is ruled out), so the work is fixed.
Compile time is the first call less the median. Needs the extra `test`, 3 GB of
disk, 5 GB of memory and no one else on the machine: how much others used is
printed. --workdir keeps the model, for the next run to find. --profile runs
the cases a few times more under each side's profiler and prints where the time
went; of ours it also leaves a trace for Perfetto or TensorBoard.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

from side_by_side import cases, compare, report, worker

from lavit_jax.core import errors


def main() -> int:
  """Makes the model, compares, times, prints the table."""
  args = _arguments()
  try:
    with tempfile.TemporaryDirectory() as folder:
      found = run(args, args.workdir or folder)
  except errors.LavitError as e:
    print(e, file=sys.stderr)
    return 1
  if found is None:
    print("PyTorch and lavit_jax do not compute the same: nothing was timed.")
    return 1
  print(f"\n{report.table(found)}")
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
  return 0


def run(args, folder) -> dict | None:
  """The report, or None where the sides disagree."""
  sizes = cases.SMALL if args.small else cases.FULL
  chosen = cases.chosen(args.only, args.small)
  todo = [(case, batch) for case in chosen for batch in args.batch]
  print(f"model in {folder} ...", flush=True)
  parameters = worker.apart("model.make", folder, sizes)
  print(", ".join(f"{k} {v / 1e6:.2f} M" for k, v in parameters.items()))
  names = worker.SIDES if args.side == "both" else [args.side]
  workers = {
    name: worker.Worker(name, folder, sizes, args.threads) for name in names
  }
  firsts, agree = check(todo, workers, sizes)
  if not all(agree):
    return None
  found = report.origin(args.threads) | {
    "parameters": parameters,
    "small": args.small,
    "repeats": args.repeats,
  }
  found["rows"] = measure(todo, workers, firsts, args.repeats)
  if args.profile:
    profile(todo, workers, args.repeats, pathlib.Path(args.profile))
  for one in workers.values():
    found["versions"] |= one.ask("versions")
    one.close()
  return found


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--small", action="store_true", help="a toy, in seconds")
  parser.add_argument(
    "--only", nargs="+", default=[], metavar="CASE", help="names or beginnings"
  )
  parser.add_argument("--batch", nargs="+", type=int, default=cases.BATCHES)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--side", choices=["both", *worker.SIDES], default="both")
  parser.add_argument("--profile", metavar="DIR")
  parser.add_argument("--workdir", help="where the model is kept and found")
  args = parser.parse_args()
  if not cases.chosen(args.only, args.small):
    names = ", ".join(case.name for case in cases.CASES)
    parser.error(f"--only {' '.join(args.only)}: the cases are {names}.")
  if args.repeats < 1 or args.threads < 1 or min(args.batch) < 1:
    parser.error("--repeats, --threads and --batch: expected 1 or more.")
  return args


def check(todo, workers, sizes):
  """First calls: their seconds and arrays agree or not, a line each.

  Returns:
    (seconds by case name, batch and side; a bool for each comparison).
  """
  seconds, agree = {}, []
  for case, batch in todo:
    found, judged = {}, {}
    for name, one in workers.items():
      took, found[name] = one.ask("first", case, batch)
      seconds[case.name, batch, name] = took
      judged[name] = one.ask("judged", case, batch)
    label = f"{case.name}, batch {batch}"
    if len(workers) < 2:
      print(f"{label}: first call done, not compared", flush=True)
      continue
    good, text = compare.first_calls(case, batch, sizes, found, judged)
    agree.append(good)
    print(f"{label}: {'' if good else 'DISAGREE: '}{text}", flush=True)
  return seconds, agree


def measure(todo, workers, firsts, repeats, say=print) -> list[dict]:
  """Runs the sides in turn; a row for each case and batch."""
  rows = []
  for case, batch in todo:
    times, others = {name: [] for name in workers}, []
    for _ in range(repeats):
      for name, one in workers.items():
        seconds, taken = one.ask("again", case, batch)
        times[name].append(seconds)
        others.append(taken)
    row = {"case": case.name, "batch": batch}
    row |= {"unit": case.unit, "count": case.count * batch}
    row |= {name: _figures(seconds) for name, seconds in times.items()}
    if "ours" in row:
      first = firsts[case.name, batch, "ours"]
      row["ours"]["compile_s"] = max(first - row["ours"]["median_s"], 0.0)
    row["wall_s"] = sum(map(sum, times.values()))
    row["others_cpu_s"] = None if None in others else max(sum(others), 0.0)
    rows.append(row)
    text = ", ".join(
      f"{name} {row[name]['median_s']:.4f} s ({row[name]['min_s']:.4f} to"
      f" {row[name]['max_s']:.4f})"
      for name in workers
    )
    say(f"{case.name}, batch {batch}: {text}", flush=True)
  return rows


def _figures(seconds):
  return {
    "median_s": statistics.median(seconds),
    "min_s": min(seconds),
    "max_s": max(seconds),
  }


def profile(todo, workers, repeats, folder):
  """Runs every case under the profiler of each side."""
  for case, batch in todo:
    for name, one in workers.items():
      target = folder / f"{case.name}_{batch}_{name}"
      one.ask("profile", case, batch, repeats, str(target))
      print(f"\n{target}:\n{(target / 'summary.txt').read_text()}", flush=True)


if __name__ == "__main__":
  sys.exit(main())
