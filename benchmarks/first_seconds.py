"""Compares the CPU time of first commands between two checkouts.

`lavit caption` with the shipped model `tiny`: a first call, with an empty
folder of compiled programs, and a second call, which finds them. And `lavit
--help`. CPU time is user + system of the whole process; the checkouts take
turns, so that other work on the machine disturbs both alike.

  python benchmarks/first_seconds.py BEFORE AFTER [--rounds 3] [--json]
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

CALLS = ("first caption", "second caption", "help")


def measure(
  checkout: pathlib.Path, argv: Sequence[str], cache: pathlib.Path
) -> dict[str, float]:
  """Runs a command of a checkout.

  Args:
    checkout: the folder that holds lavit_jax.
    argv: the words after `lavit`.
    cache: XDG_CACHE_HOME, where compiled programs are kept.

  Returns:
    cpu_s, the CPU time of the process, and wall_s.

  Raises:
    SystemExit: the command failed.
  """
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "lavit_jax", *argv],
    cwd=checkout,
    env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    capture_output=True,
    text=True,
  )
  wall = time.monotonic() - start
  if done.returncode:
    raise SystemExit(f"{checkout}: lavit {' '.join(argv)}: {done.stderr}")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return {"cpu_s": cpu, "wall_s": wall}


def compare(
  checkouts: Sequence[pathlib.Path], rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
  """Measures all calls of all checkouts, which take turns.

  Returns:
    By checkout and call the medians of cpu_s and wall_s.
  """
  rows: dict[str, dict[str, list[dict[str, float]]]] = {
    str(path): {call: [] for call in CALLS} for path in checkouts
  }
  with tempfile.TemporaryDirectory() as folder:
    scene = pathlib.Path(folder) / "scene.png"
    draw = ["generate", "a large red circle", "--out", str(scene)]
    measure(checkouts[0], draw, pathlib.Path(folder) / "cache")
    for number in range(rounds):
      for i, path in enumerate(checkouts):
        cache = pathlib.Path(folder) / f"cache_{number}_{i}"
        words = {"help": ["--help"]}
        for call in CALLS:
          argv = words.get(call, ["caption", str(scene)])
          rows[str(path)][call].append(measure(path, argv, cache))
  return {
    path: {
      call: {
        name: statistics.median(run[name] for run in runs)
        for name in ("cpu_s", "wall_s")
      }
      for call, runs in calls.items()
    }
    for path, calls in rows.items()
  }


def table(medians: dict[str, dict[str, dict[str, float]]]) -> str:
  """Returns a Markdown table of the CPU times and the ratio of the two."""
  before, after = medians.values()
  lines = ["| call | before, CPU s | after, CPU s | ratio | after, wall s |"]
  lines += ["|---|---|---|---|---|"]
  for call in CALLS:
    old, new = before[call]["cpu_s"], after[call]["cpu_s"]
    lines.append(
      f"| {call} | {old:.2f} | {new:.2f} | {new / old:.2f} |"
      f" {after[call]['wall_s']:.2f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Prints the table, or one JSON document."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("before", type=pathlib.Path)
  parser.add_argument("after", type=pathlib.Path)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  checkouts = [args.before.resolve(), args.after.resolve()]
  medians = compare(checkouts, args.rounds)
  print(json.dumps(medians, indent=2) if args.json else table(medians))


if __name__ == "__main__":
  main()
