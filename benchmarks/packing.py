"""Packed rows against padded ones: useful tokens a second of a training step.

  python benchmarks/packing.py [--json] [--out times.json]

Documents are like captioned images: 2 marks, 90 visual words on average (a
third of 256 patches, 30 to 190, by a normal distribution of deviation 30), and
a caption of 6 to 40 pieces, 12 in the median. A LLaMA of 17 M parameters
takes a whole step (forward, backward, AdamW, float32) on as many positions,
padding included, in three ways:

  packed   several documents a row, as `lavit train` does: rows of 256 by
           first-fit decreasing, attention inside documents
  padded   a document a row, rows as long as the longest document there can be
  longest  a document a row, rows as long as the longest of their batch, in
           steps of 32, which is one more program for each length

First the losses of the same documents must agree, packed and padded, to 1e-4;
then the ways run in turn on several batches of their own. Numbers are useful
tokens over the sum of seconds; ratios are to "padded".

Needs 2 GB of memory and no one else on the machine.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
from side_by_side import steps, steps_ours

from lavit_jax.commands import train as train_command
from lavit_jax.core import averages, sharding
from lavit_jax.data.batching import packing

_LONGEST = 2 + 190 + 40
_STEP = 32
_AGREE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """The model, and positions a step."""

  model: steps.Llama
  positions: int
  packed_length: int


FULL = Sizes(
  model=steps.Llama(
    width=384, depth=6, num_heads=6, mlp_dim=1024, vocab_size=8192
  ),
  positions=4096,
  packed_length=256,
)
SMALL = Sizes(
  model=steps.Llama(width=32, depth=1, num_heads=2, mlp_dim=64, vocab_size=64),
  positions=1024,
  packed_length=256,
)


def documents(rng, count: int, vocab_size: int) -> list[np.ndarray]:
  """Ids of documents as long as captioned images are."""
  visual = np.clip(rng.normal(90, 30, count), 30, 190)
  caption = np.clip(rng.lognormal(np.log(12), 0.4, count), 6, 40)
  lengths = 2 + visual.astype(int) + caption.astype(int)
  return [rng.integers(0, vocab_size, n, np.int32) for n in lengths]


def batch_of(docs, rows, length: int) -> dict[str, np.ndarray]:
  """Arrays [rows, length] of documents, each row a list of their indices."""
  names = {"tokens": np.int32, "targets": np.int32, "segments": np.int32}
  names["weights"] = np.float32
  batch = {k: np.zeros((len(rows), length), v) for k, v in names.items()}
  for i, row in enumerate(rows):
    place = 0
    for number, index in enumerate(row, 1):
      ids = docs[index]
      here = slice(place, place + len(ids))
      batch["tokens"][i, here] = ids
      batch["targets"][i, here] = np.append(ids[1:], 0)
      batch["segments"][i, here] = number
      batch["weights"][i, here] = np.append(np.ones(len(ids) - 1), 0.0)
      place += len(ids)
  return batch


def batches(way: str, sizes: Sizes, count: int) -> list[dict]:
  """Batches of one way, each of `sizes.positions` positions at most."""
  rng = np.random.default_rng(0)
  padded = -(-_LONGEST // _STEP) * _STEP
  docs = documents(rng, 64 * count, sizes.model.vocab_size)
  if way == "packed":
    limit = np.array([[len(d), 0] for d in docs])
    rows = packing.first_fit(limit, sizes.packed_length, 0)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    length, each = sizes.packed_length, sizes.positions // sizes.packed_length
  else:
    rows = [[i] for i in range(len(docs))]
    length, each = padded, sizes.positions // padded
  made = []
  for start in range(0, each * count, each):
    chosen = rows[start : start + each]
    if way == "longest":
      longest = max(len(docs[i]) for row in chosen for i in row)
      length = -(-longest // _STEP) * _STEP
    made.append(batch_of(docs, chosen, length))
  return made


class Trainer:
  """A model and its step, for batches of any shape."""

  def __init__(self, sizes: Sizes):
    objective, phase = steps_ours.build(sizes.model, 1)
    init = lambda: sharding.unbox(objective.init(jax.random.key(0)))[0]
    tree = {"params": jax.jit(init)()}
    self._made = steps_ours.start(objective, phase, tree)
    self._step, self._state, self._frozen, self._mesh = self._made
    self._objective, self._phase = objective, phase

  def seconds(self, batch) -> float:
    """Seconds of one step; the state moves on."""
    begin = time.perf_counter()
    with sharding.use(self._mesh):
      on_mesh = sharding.put_batch(batch, self._mesh)
      self._state, metrics = self._step(self._state, self._frozen, on_mesh)
    averages.value(metrics["loss"])
    return time.perf_counter() - begin

  def loss(self, batch) -> float:
    """The loss alone."""
    with sharding.use(self._mesh):
      loss, _ = jax.jit(
        lambda params, batch: self._objective.loss(
          self._phase, params, {}, {}, batch, None
        )
      )(self._state.params, sharding.put_batch(batch, self._mesh))
    return float(loss)


def agreement(trainer, sizes: Sizes) -> float:
  """How far apart the losses of the same documents are, packed and padded."""
  docs = documents(np.random.default_rng(1), 8, sizes.model.vocab_size)
  limit = np.array([[len(d), 0] for d in docs])
  rows = packing.first_fit(limit, sizes.packed_length, 0)
  rows += [[]] * (-len(rows) % 8)
  packed = batch_of(docs, rows, sizes.packed_length)
  padded = batch_of(docs, [[i] for i in range(8)], _LONGEST)
  return abs(trainer.loss(packed) - trainer.loss(padded))


def measure(sizes: Sizes, repeats: int) -> dict | None:
  """Useful tokens a second of each way; None where losses differ."""
  trainer = Trainer(sizes)
  apart = agreement(trainer, sizes)
  if not apart <= _AGREE:
    print(f"losses are {apart} apart", file=sys.stderr)
    return None
  ways = ("packed", "padded", "longest")
  todo = {way: batches(way, sizes, repeats) for way in ways}
  for way in ways:  # compiles
    shapes = {batch["tokens"].shape: batch for batch in todo[way]}
    for batch in shapes.values():
      trainer.seconds(batch)
  seconds = {way: [] for way in ways}
  for turn in range(repeats):
    for way in ways:
      seconds[way].append(trainer.seconds(todo[way][turn]))
  found = {"loss_apart": apart, "repeats": repeats, "ways": {}}
  for way in ways:
    useful = sum(int((b["segments"] > 0).sum()) for b in todo[way])
    places = sum(batch["segments"].size for batch in todo[way])
    found["ways"][way] = {
      "rows": list(todo[way][0]["tokens"].shape),
      "fill": useful / places,
      "step_s": float(np.median(seconds[way])),
      "min_s": min(seconds[way]),
      "max_s": max(seconds[way]),
      "tokens_per_second": useful / sum(seconds[way]),
    }
  base = found["ways"]["padded"]["tokens_per_second"]
  for row in found["ways"].values():
    row["ratio"] = row["tokens_per_second"] / base
  return found


def _table(found) -> str:
  head = ("way", "rows", "fill", "step s", "useful tokens a second", "ratio")
  lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
  for way, row in found["ways"].items():
    rows, length = row["rows"]
    lines.append(
      f"| {way} | {rows} x {length} | {row['fill']:.0%} |"
      f" {row['step_s']:.3f} ({row['min_s']:.3f} to {row['max_s']:.3f}) |"
      f" {row['tokens_per_second']:.0f} | {row['ratio']:.2f} |"
    )
  return "\n".join(lines)


def main(argv=None) -> int:
  """Measures and prints; 1 where losses differ."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--small", action="store_true", help="a toy, in seconds")
  parser.add_argument("--repeats", type=int, default=5, help="batches (5)")
  args = parser.parse_args(argv)
  if args.repeats < 1:
    parser.error("--repeats: expected 1 or more.")
  sizes = SMALL if args.small else FULL
  train_command.use_cpu_cores(sizes.positions // sizes.packed_length)
  found = measure(sizes, args.repeats)
  if found is None:
    return 1
  found["date"] = datetime.date.today().isoformat()
  found["machine"] = f"{os.cpu_count()} cores, {jax.device_count()} devices"
  print(json.dumps(found, indent=1) if args.json else _table(found))
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
