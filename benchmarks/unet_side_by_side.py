"""Sampling by a U-Net, side by side with diffusers; memory of VAE decoding.

  python benchmarks/unet_side_by_side.py [--out times.json]
  python benchmarks/unet_side_by_side.py --profile DIR

A U-Net of Stable Diffusion 1.5's shape, about 100 M parameters at random, in a
diffusers folder that both sides load: the same weights, the same noise, ten
steps of DDIM with guidance 5 at 512 x 512 (latents 64 x 64), 256 tokens of
condition, 77 seen in the unconditional stream, float32, as many threads (2), a
process for each side. First both must draw the same; then they run in turn, A
B A B, and medians are printed. Compile time is the first call less the median;
memory is the most that each process has held (of ours while compiling, too).

Single convolutions of such a U-Net are timed by themselves too.

Then what decoding a 1024 x 1024 image takes by the autoencoder of Stable
Diffusion at full size, whole and in tiles, as XLA lays it out in advance.

Needs the extra `test`, 4 GB of memory and no one else on the machine.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import pytorch_side_by_side as common
from side_by_side import report, unet_cases, worker

MODULES = {"torch": "unet_torch", "ours": "unet_ours"}
_APART = 1e-3  # of the largest latent: ten guided steps in float32


def main() -> int:
  """Makes the U-Net, compares, times, prints the tables."""
  args = _arguments()
  with tempfile.TemporaryDirectory() as folder:
    found = run(args, folder)
  if found is None:
    print("diffusers and lavit_jax do not draw the same: nothing was timed.")
    return 1
  print(f"\n{report.table(found)}\n\n{memory_table(found)}")
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
  return 0


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--small", action="store_true", help="a toy, in seconds")
  parser.add_argument("--batch", nargs="+", type=int, default=[1])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--profile", metavar="DIR")
  args = parser.parse_args()
  if args.repeats < 1 or args.threads < 1 or min(args.batch) < 1:
    parser.error("--repeats, --threads and --batch: expected 1 or more.")
  return args


def run(args, folder) -> dict | None:
  """The report, or None where the sides disagree."""
  sizes = unet_cases.SMALL if args.small else unet_cases.FULL
  todo = [(case, batch) for case in unet_cases.CASES for batch in args.batch]
  parameters = worker.apart("unet_ours.make", folder, sizes)
  print(f"U-Net of {parameters['unet'] / 1e6:.2f} M parameters", flush=True)
  workers = {
    name: worker.Worker(name, folder, sizes, args.threads, MODULES)
    for name in MODULES
  }
  firsts = {}
  for case, batch in todo:
    drawn = {}
    for name, one in workers.items():
      seconds, arrays = one.ask("first", case, batch)
      firsts[case.name, batch, name] = seconds
      drawn[name] = arrays["latents"]
    apart = np.abs(drawn["ours"] - drawn["torch"]).max()
    apart /= np.abs(drawn["torch"]).max()
    label = f"{case.name}, batch {batch}"
    print(f"{label}: latents {apart:.0e} apart, of the largest", flush=True)
    if not apart <= _APART:
      return None
  found = report.origin(args.threads) | {
    "parameters": parameters,
    "small": args.small,
    "repeats": args.repeats,
  }
  found["rows"] = common.measure(todo, workers, firsts, args.repeats)
  shapes = unet_cases.CONVOLUTIONS
  found["convolutions"] = {
    name: one.ask("convolutions", shapes) for name, one in workers.items()
  }
  found["peak_mb"] = {name: one.ask("peak") for name, one in workers.items()}
  if args.profile:
    folder = pathlib.Path(args.profile)
    common.profile(todo, workers, args.repeats, folder)
  for one in workers.values():
    found["versions"] |= one.ask("versions")
    one.close()
  found["vae"] = worker.apart("unet_ours.vae_memory", folder, sizes)
  return found


def memory_table(found) -> str:
  """Peaks of both processes, and the VAE's temporary memory."""
  peak = ", ".join(f"{n} {mb:.0f} MB" for n, mb in found["peak_mb"].items())
  whole = found["vae"][0]["temporary_mb"]
  lines = [
    "Single 3 x 3 convolutions, GFLOP/s: "
    + "; ".join(
      f"{name} {' '.join(f'{rate:.0f}' for rate in rates)}"
      for name, rates in found["convolutions"].items()
    ),
    f"Most memory held while sampling: {peak}",
    "",
    "| VAE decode | temporary MB | of whole | compile s |",
    "|---|---|---|---|",
  ]
  for row in found["vae"]:
    name = "whole" if row["tile"] is None else f"tiles of {row['tile']} places"
    lines.append(
      f"| {name} | {row['temporary_mb']:.0f} |"
      f" {row['temporary_mb'] / whole:.0%} | {row['compile_s']:.1f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
