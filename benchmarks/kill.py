"""Kills a run again and again, and compares it with one that was left alone.

  python benchmarks/kill.py                 25 kills of the micro pretrain
  python benchmarks/kill.py --kills 4 --steps 40 --json

Two runs of the tiny `pretrain`, made smaller (width 16), on the model
directory and code caches of --source, which are trained first if there are
none. One goes straight through; the other gets SIGKILL at random instants:
every second one somewhere within a save (while Orbax has an unfinished folder
in the checkpoints), the others at a random time after some random step. Each
start must go on from the newest checkpoint. In the end the parameters of both
must be equal, bit for bit, and so must the digests of the batches of every
step. The exit status is 0 if they are, 1 if not.
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile
import time

import jax
import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

from lavit_jax.core.storage import checkpoints
from lavit_jax.train.telemetry import writers
from tests import micro
from tests.train import processes


def main(argv=None) -> int:
  """Reads the flags, prints what happened; the exit status."""
  args = _parser().parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(args.source or pathlib.Path(folder) / "source")
    if not (root / "model").is_dir():
      micro.train_all(root)
    found = compare(
      root, folder, kills=args.kills, steps=args.steps, seed=args.seed
    )
  if args.json:
    print(json.dumps(found))
  else:
    for name, value in found.items():
      print(f"{name}: {value}")
  return 0 if found["same_parameters"] and found["same_batches"] else 1


def compare(source, folder, *, kills, steps, seed=0):
  """Both runs, and whether they are the same.

  Args:
    source: a folder with `model` and `codes`.
    folder: for what is made, empty.
    kills: SIGKILLs, at least; as many starts more.
    steps: of the whole run.
    seed: of the instants.

  Returns:
    kills, kills_in_saves, steps, seconds, same_parameters, same_batches.
  """
  begun = time.monotonic()
  straight, killed = micro.branch(pathlib.Path(source), folder, 2)
  settings = {
    "phases__train__steps": steps,
    "checkpoint__every": 2,
    "log__every": 1,
  }
  configs = [
    processes.write_config(root / "config.py", "pretrain", root, **settings)
    for root in (straight, killed)
  ]
  processes.run(1, configs[0], straight / "run")
  in_saves = kill_again_and_again(
    configs[1], killed / "run", kills, steps, seed
  )
  processes.run(1, configs[1], killed / "run")
  left, right = (
    checkpoints.load_part(root / "model", "llm").params
    for root in (straight, killed)
  )
  same = jax.tree.map(
    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), left, right
  )
  rows = [digests(root / "run") for root in (straight, killed)]
  return {
    "kills": kills,
    "kills_in_saves": in_saves,
    "steps": steps,
    "seconds": round(time.monotonic() - begun, 1),
    "same_parameters": all(jax.tree.leaves(same)),
    "same_batches": rows[0] == rows[1] and len(rows[0]) == steps,
  }


def kill_again_and_again(config, workdir, kills, steps, seed) -> int:
  """Starts a run and kills it, `kills` times; how many times in a save."""
  rng, in_saves = random.Random(seed), 0
  share = max((steps - 4) // kills, 1)  # so that the run outlives all of them
  for number in range(kills):
    with processes.running(1, config, workdir) as group:
      wanted = number * share + rng.randrange(share) + 1
      _wait_for_step(workdir, wanted, group)
      if number % 2:
        in_saves += _wait_for_save(workdir, rng, group)
      else:
        time.sleep(rng.random() * 0.3)
      group.kill()
  return in_saves


def _wait_for_step(workdir, step, group) -> None:
  """Until this start has begun and the run has reached a step."""
  begun, log = time.time(), workdir / "batches.jsonl"
  while group.children[0].poll() is None:
    rows = writers.read_json_lines(log) if log.exists() else []
    if rows and rows[-1]["time"] > begun and rows[-1]["step"] >= step:
      return
    time.sleep(0.01)


def _wait_for_save(workdir, rng, group, timeout=20) -> int:
  """Until a save is under way, and a random moment; 1 if there was one."""
  end = time.monotonic() + timeout
  while time.monotonic() < end and group.children[0].poll() is None:
    if list(workdir.glob("checkpoints/*tmp*")):
      time.sleep(rng.random() * 0.05)
      return int(bool(list(workdir.glob("checkpoints/*tmp*"))))
    time.sleep(0.0005)
  return 0


def digests(workdir) -> dict[int, tuple]:
  """Of the batch of every step."""
  rows = writers.read_json_lines(workdir / "batches.jsonl")
  return {row["step"]: (row["crc32"], row["example"]) for row in rows}


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=25, help="(25)")
  parser.add_argument("--steps", type=int, default=120, help="(120)")
  parser.add_argument("--seed", type=int, default=0, help="of the instants (0)")
  parser.add_argument(
    "--source", metavar="DIR", help="with model and codes of micro configs"
  )
  parser.add_argument("--json", action="store_true", help="one line of JSON")
  return parser


if __name__ == "__main__":
  sys.exit(main())
