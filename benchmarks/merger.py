"""Times the merger's two forms side by side on the machine at hand.

  python benchmarks/merger.py [--repeats 10]

One block of the full-size merger (width 1408, 16 heads, hidden 6144), forward
pass in float32, 256 patches of which a third is kept: `reference` runs all
positions with the official softmax, `compact` only the kept ones.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models.tokenizer import merger

NUM_PATCHES = 256
KEPT = NUM_PATCHES // 3


def median_seconds(functions, repeats):
  """Median seconds of each function, run in turn so that all suffer alike."""
  times = {name: [] for name in functions}
  for function in functions.values():
    jax.block_until_ready(function())  # compiles
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def measure(batch=1, repeats=10):
  """Seconds a form and their ratio, with the machine and the date."""
  config = dataclasses.replace(
    merger.LAVIT_7B, depth=1, dtype="float32", remat="none"
  )
  model = merger.TokenMerger(config)
  shape = (batch, NUM_PATCHES)
  features = jax.random.normal(jax.random.key(0), (*shape, config.width))
  score = jax.random.uniform(jax.random.key(1), shape)
  keep = score >= jnp.sort(score, axis=1)[:, -KEPT][:, None]
  mask = keep.astype(jnp.float32)
  variables = nn.meta.unbox(
    jax.jit(model.init)(jax.random.key(2), features, mask)
  )

  @jax.jit
  def reference(variables, features, mask):
    return model.apply(variables, features, mask, form="reference")

  @jax.jit
  def compact(variables, features, keep):
    return model.apply(variables, features, keep, KEPT, method="compact")[0]

  seconds = median_seconds(
    {
      "reference": lambda: reference(variables, features, mask),
      "compact": lambda: compact(variables, features, keep),
    },
    repeats,
  )
  return {
    "patches": NUM_PATCHES,
    "kept": KEPT,
    "width": config.width,
    "batch": batch,
    "reference_s": round(seconds["reference"], 5),
    "compact_s": round(seconds["compact"], 5),
    "ratio": round(seconds["reference"] / seconds["compact"], 2),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores,"
    f" {jax.devices()[0].device_kind}",
    "date": datetime.date.today().isoformat(),
  }


def main():
  """Prints the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--repeats", type=int, default=10)
  args = parser.parse_args()
  print(json.dumps(measure(args.batch, args.repeats), indent=2))


if __name__ == "__main__":
  main()
