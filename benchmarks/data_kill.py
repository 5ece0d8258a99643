"""Kills the processes that read a run's data, and compares what they read.

  python benchmarks/data_kill.py [--rounds 20] [--seed 0] [--json]

Five sources (JSON lines, tar archives, scenes, texts, dialogues) with weights,
one of which changes on the way, are packed into rows. In each round 1, 2 or 4
processes, "hosts", read batches of 8 or 12 rows from the first example that
not all of them had read before, with 0, 2 or 4 threads each, and get SIGKILL
at a random instant. In the end every row must be, bit for bit, that of one
process which reads them all without a stop, and none may be missing. The state
that a round hands to the next one is JSON of a few bytes. The exit status is 0
if all is so, 1 if not.
"""

import argparse
import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

from lavit_jax.data.batching import pipeline
from tests.data import five_sources

_LONGEST = 2.0  # seconds from the first batch to the kill


def main(argv=None) -> int:
  """Reads the flags, prints what happened; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=20, metavar="N")
  parser.add_argument("--seed", type=int, default=0, metavar="N")
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  logging.disable(logging.WARNING)  # of texts that are split
  if args.worker:
    return _work(**json.loads(args.worker))
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LAVIT_INDEXES"] = f"{folder}/indexes"
    found = compare(pathlib.Path(folder), args.rounds, args.seed)
  print(json.dumps(found) if args.json else _described(found))
  return 0 if found["equal"] and not found["missing"] else 1


def _described(found):
  return "\n".join(f"{name}: {value}" for name, value in found.items())


def compare(folder: pathlib.Path, rounds: int, seed: int) -> dict:
  """Returns what was read in all rounds, beside one undisturbed process.

  Args:
    folder: for the data and the logs, empty.
    rounds: number of kills.
    seed: of numbers of processes, batch sizes and instants.
  """
  (folder / "data").mkdir()
  config = five_sources.write(folder / "data", count=300)
  rng, state, read = random.Random(seed), {"next_example": 0}, {}
  used, largest, again = [], 0, 0
  for number in range(rounds):
    hosts, size = rng.choice((1, 2, 4)), (8, 12)[number % 2]
    logs = [folder / f"{number}-{host}.log" for host in range(hosts)]
    _round(config, state, hosts, size, rng, logs)
    complete, rows = [], {}
    for log in logs:
      lines = _lines(log)
      complete.append(len(lines))
      rows |= {n: crc for line in lines for n, crc in line}
    done = min(complete)  # a step is done where all hosts have its rows
    first = state["next_example"]
    again += sum(n >= first + done * size for n in rows)
    for n, crc in rows.items():
      if n < first + done * size:
        read.setdefault(n, crc)
    state = json.loads(json.dumps({"next_example": first + done * size}))
    largest = max(largest, len(json.dumps(state)))
    used.append((hosts, size))
  total = state["next_example"]
  straight = _straight(config, total)
  return {
    "kills": rounds,
    "rows": total,
    "missing": sorted(set(range(total)) - set(read))[:10],
    "equal": read == straight,
    "read again": again,
    "hosts": sorted({hosts for hosts, _ in used}),
    "bytes of state": largest,
  }


def _round(config, state, hosts, size, rng, logs):
  """Has processes read until they are killed."""
  workers = []
  for host, log in enumerate(logs):
    work = dict(
      config=config,
      size=size,
      first=state["next_example"],
      rows=np.arange(size).reshape(hosts, -1)[host].tolist(),
      threads=rng.choice((0, 2, 4)),
      log=str(log),
    )
    command = [sys.executable, __file__, "--worker", json.dumps(work)]
    workers.append(subprocess.Popen(command))
  try:
    while not all(log.exists() and log.stat().st_size for log in logs):
      if any(worker.poll() is not None for worker in workers):
        raise SystemExit("A process that reads ended by itself.")
      time.sleep(0.05)
    time.sleep(rng.uniform(0, _LONGEST))
  finally:
    for worker in rng.sample(workers, len(workers)):
      worker.send_signal(signal.SIGKILL)
      worker.wait()


def _work(config, size, first, rows, threads, log) -> int:
  """Reads batches without end; writes a line of (row, CRC-32) a batch."""
  iterator = pipeline.iterate(
    five_sources.batches(config, size),
    num_threads=threads,
    rows=rows,
    skip=first,
  )
  with open(log, "w") as file:
    for batch in iterator:
      print(json.dumps(_digests(batch)), file=file, flush=True)
  return 0


def _digests(batch):
  """Returns (number, CRC-32) of each row of a batch."""
  digests = []
  for j, number in enumerate(batch["row"].tolist()):
    crc = 0
    for name in sorted(batch):
      crc = zlib.crc32(np.ascontiguousarray(batch[name][j]).tobytes(), crc)
    digests.append((number, crc))
  return digests


def _lines(log):
  """Returns the whole lines of a log; the last one may be cut."""
  text = log.read_text()
  whole = text[: text.rfind("\n") + 1]
  return [json.loads(line) for line in whole.splitlines()]


def _straight(config, total):
  """Returns CRC-32 of each row, read by this process alone."""
  batches = five_sources.batches(config, 4)
  found = {}
  for batch in pipeline.iterate(batches, num_threads=0):
    found |= dict(_digests(batch))
    if len(found) >= total:
      break
  return {number: crc for number, crc in found.items() if number < total}


if __name__ == "__main__":
  sys.exit(main())
