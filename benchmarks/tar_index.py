"""How long it takes to index tar archives, beside `tar t` of the same ones.

  python benchmarks/tar_index.py [--shards 100] [--samples 1000] [--json]

Writes archives of small samples (an image of 3 KB, a caption, a json) to a
temporary folder, which takes about 5 KB a sample, and then in turn, so that
the archives are in memory for all of them:

  tar t     lists the archives with GNU tar, one after the other
  index     makes all indexes, in as many processes as there are cores
  again     opens the archives with the indexes there, as a second run does

Of three rounds the fastest counts. Memory is what the columns of all samples
take.
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import time

from lavit_jax.data.sources import webdataset

_ROUNDS = 3


def main() -> None:
  """Prints a line for each of the three, or JSON."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shards", type=int, default=100, metavar="N")
  parser.add_argument("--samples", type=int, default=1000, metavar="N")
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    root = pathlib.Path(place)
    os.environ["LAVIT_INDEXES"] = str(root / "indexes")
    data = _write(root / "data", args.shards, args.samples)
    rounds = [_round(root, data) for _ in range(_ROUNDS)]
  found = {name: min(r[name] for r in rounds) for name in rounds[0]}
  found |= {
    "samples": args.shards * args.samples,
    "index to tar t": found["tar t"] / found["index"],
    "cores": os.cpu_count(),
    "date": datetime.date.today().isoformat(),
  }
  if args.json:
    print(json.dumps(found, indent=2))
    return
  print(
    f"{args.shards} archives of {args.samples} samples, {os.cpu_count()} cores"
  )
  for name in ("tar t", "index", "again"):
    print(f"{name:8s} {found[name]:7.2f} s")
  print(f"index at {found['index to tar t']:.2f} x the speed of tar t")
  print(f"{found['bytes a sample']:.0f} bytes of memory a sample")


def _write(folder, shards, samples):
  """Writes archives of the same files; returns their folder."""
  folder.mkdir()
  first = folder / "00000.tar"
  with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
    for i in range(samples):
      for suffix, data in (
        ("jpg", b"\xff\xd8" + bytes(3000)),
        ("txt", b"a small caption of image %d" % i),
        (
          "json",
          b'{"caption": "a small caption", "width": 256, "height": 256}',
        ),
      ):
        info = tarfile.TarInfo(f"{i:09d}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  for number in range(1, shards):
    shutil.copy(first, folder / f"{number:05d}.tar")
  return folder


def _round(root, data):
  """Seconds of each of the three, and bytes of memory a sample."""
  shutil.rmtree(root / "indexes", ignore_errors=True)
  archives = sorted(map(str, data.iterdir()))
  start = time.perf_counter()
  for archive in archives:
    subprocess.run(
      ["tar", "tf", archive], stdout=subprocess.DEVNULL, check=True
    )
  listed = time.perf_counter()
  webdataset.WebDatasetSource(data, 224, quiet=True)
  made = time.perf_counter()
  source = webdataset.WebDatasetSource(data, 224, quiet=True)
  source.example("image_text", 0)
  again = time.perf_counter()
  held = source._columns.nbytes + source._numbers.nbytes
  held += source._captioned.nbytes
  return {
    "tar t": listed - start,
    "index": made - listed,
    "again": again - made,
    "bytes a sample": held / source.num_images,
  }


if __name__ == "__main__":
  main()
