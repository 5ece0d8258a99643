"""Images a second of our loader and of others, side by side on this machine.

  pip install -e '.[fast,parquet]' torch torchvision webdataset datasets \
    litdata psutil
  python benchmarks/data_speed.py PHOTOGRAPHS.jsonl [--rounds 3]
  python benchmarks/data_speed.py PHOTOGRAPHS.jsonl --large
  python benchmarks/data_speed.py PHOTOGRAPHS.jsonl --minutes 10

PHOTOGRAPHS.jsonl: lines of image and captions (JPEGs), repeated under other
names until there are 2,000. Every loader has two worker processes and makes the
same batches: 64 images, decoded, resized to 224 x 224 by antialiased bicubic
interpolation, and the ids of a caption each. Loaders run one after the other,
each in a process of its own, in several rounds. "limit" is the same decoding
and resizing in two processes with nothing around them. With --large, the
photographs are enlarged to 2,000 pixels, and only ours run. With --minutes, the
memory of our loader and its processes is read meanwhile.
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

SIDE, BATCH, LENGTH, WORKERS = 224, 64, 32, 2
COUNT = 2048
LARGE = 2000  # pixels of the shorter side
WARM = 4  # batches that are not timed


def _tokenizer():
  import sentencepiece

  path = os.environ["DATA_SPEED_TOKENIZER"]
  return sentencepiece.SentencePieceProcessor(model_file=path)


def _ids(tokenizer, text):
  ids = tokenizer.encode(text)[:LENGTH]
  return np.array(ids + [0] * (LENGTH - len(ids)), np.int32)


def _pillow(data):
  image = Image.open(io.BytesIO(data)).convert("RGB")
  return np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _torchvision(data):
  import torch
  import torchvision
  from torchvision.transforms import InterpolationMode
  from torchvision.transforms.v2 import functional

  tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
  mode = torchvision.io.ImageReadMode.RGB
  pixels = torchvision.io.decode_jpeg(tensor, mode=mode)
  bicubic = InterpolationMode.BICUBIC
  return functional.resize(
    pixels, [SIDE, SIDE], interpolation=bicubic, antialias=True
  )


class Folder:
  """A map-style dataset of the files, for DataLoader and Grain."""

  def __init__(self, root, decode):
    self.root = pathlib.Path(root)
    text = (self.root / "my.jsonl").read_text()
    self.rows = [json.loads(line) for line in text.splitlines()]
    self.decode, self.tokenizer = decode, None

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    self.tokenizer = self.tokenizer or _tokenizer()
    row = self.rows[i]
    data = (self.root / row["image"]).read_bytes()
    caption = row["captions"][0]
    return self.decode(data), _ids(self.tokenizer, caption)


def _worker_init(_):
  import torch

  torch.set_num_threads(1)


def _data_loader(dataset, **kwargs):
  import torch
  import torchvision  # noqa: F401  # here, so that no worker has to

  return torch.utils.data.DataLoader(
    dataset,
    num_workers=WORKERS,
    persistent_workers=True,
    worker_init_fn=_worker_init,
    prefetch_factor=4,
    **{"batch_size": BATCH, "shuffle": True} | kwargs,
  )


def torch_pillow(root):
  return _forever(lambda: _data_loader(Folder(root, _pillow)))


def torch_torchvision(root):
  return _forever(lambda: _data_loader(Folder(root, _torchvision)))


def webdataset(root):
  import webdataset as wds

  tokenizer = []

  def make(sample):
    if not tokenizer:
      tokenizer.append(_tokenizer())
    caption = sample["txt"].decode()
    return _pillow(sample["jpg"]), _ids(tokenizer[0], caption)

  dataset = (
    wds.WebDataset(f"{root}/tars/{{00..07}}.tar", shardshuffle=8)
    .shuffle(256)
    .map(make)
    .batched(BATCH, partial=False)
  )
  return _forever(
    lambda: wds.WebLoader(
      dataset,
      num_workers=WORKERS,
      batch_size=None,
      prefetch_factor=4,
      persistent_workers=True,
    )
  )


def hf_datasets(root):
  import datasets

  tokenizer = []

  def make(rows):
    if not tokenizer:
      tokenizer.append(_tokenizer())
    return {
      "pixels": [_pillow(image["bytes"]) for image in rows["image"]],
      "ids": [_ids(tokenizer[0], text) for text in rows["caption"]],
    }

  dataset = datasets.load_from_disk(f"{root}/hf")
  dataset = dataset.cast_column("image", datasets.Image(decode=False))
  return _forever(lambda: _data_loader(dataset.with_transform(make)))


def litdata(root):
  import litdata as ld
  import torchvision  # noqa: F401

  tokenizer = []

  class Decoded(ld.StreamingDataset):
    def __getitem__(self, index):
      row = super().__getitem__(index)
      if not tokenizer:
        tokenizer.append(_tokenizer())
      return _torchvision(row["image"]), _ids(tokenizer[0], row["caption"])

  return _forever(
    lambda: ld.StreamingDataLoader(
      Decoded(f"{root}/litdata", shuffle=True),
      batch_size=BATCH,
      num_workers=WORKERS,
      prefetch_factor=4,
      persistent_workers=True,
    )
  )


def grain(root):
  import grain.python as pygrain
  from absl import flags

  flags.FLAGS(["data_speed"])  # its processes need them
  dataset = (
    pygrain.MapDataset.source(Folder(root, _pillow))
    .shuffle(seed=0)
    .repeat()
    .batch(BATCH)
    .to_iter_dataset(pygrain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    .mp_prefetch(pygrain.MultiprocessingOptions(num_workers=WORKERS))
  )
  return iter(dataset)


def ours(root, decoding="fast", workers=WORKERS):
  from lavit_jax.core import vocabulary
  from lavit_jax.data.batching import pipeline
  from lavit_jax.data.sources import kinds

  config = dict(
    kind="webdataset", path=f"{root}/tars", held_out_path="", image_size=SIDE,
    seed=0, decoding=decoding, workers=workers,
  )  # fmt: skip
  source = kinds.build(config, "train")
  tokenizer = vocabulary.TextTokenizer.load(os.environ["DATA_SPEED_TOKENIZER"])
  batches = pipeline.image_batches(
    source, BATCH, seed=0, tokenizer=tokenizer, text_length=LENGTH
  )
  threads = 2 * workers if workers else 2
  return pipeline.iterate(batches, num_threads=threads)


def ours_exact(root):
  return ours(root, "exact")


def ours_threads(root):
  return ours(root, "fast", workers=0)


LOADERS = {
  "ours": ours,
  "ours_exact": ours_exact,
  "ours_threads": ours_threads,
  "torch_pillow": torch_pillow,
  "torch_torchvision": torch_torchvision,
  "webdataset": webdataset,
  "datasets": hf_datasets,
  "litdata": litdata,
  "grain": grain,
}


def _forever(make):
  """Iterates over a loader again and again, whose workers go on."""
  loader = make()
  while True:
    yield from loader


def _limit(root, way):
  """Images a second of two processes that only decode and resize."""
  code = (
    "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]);"
    "import data_speed as d; from lavit_jax.data.images import decoding;"
    "f = {'pillow': d._pillow, 'torchvision': d._torchvision,"
    " 'ours': lambda x: decoding.fast(x, d.SIDE)}[sys.argv[3]];"
    "xs = [p.read_bytes() for p in"
    " sorted(pathlib.Path(sys.argv[2]).glob('*.jpg'))[:400]];"
    "f(xs[0]); sys.argv[3] == 'torchvision' and d._worker_init(0);"
    "t = time.monotonic(); n = 0\n"
    "while time.monotonic() - t < 6: f(xs[n % len(xs)]); n += 1\n"
    "print(n / (time.monotonic() - t))"
  )
  here = str(pathlib.Path(__file__).parent)
  running = [
    subprocess.Popen(
      [sys.executable, "-c", code, here, root, way],
      stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(WORKERS)
  ]
  return sum(float(one.communicate()[0]) for one in running)


def _write(rows, folder, large):
  """Writes the photographs in each format."""
  import tarfile

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tars").mkdir()
  count = 200 if large else COUNT
  lines, images = [], []
  for i, (path, captions) in zip(
    range(count), itertools.cycle(rows), strict=False
  ):
    data = path.read_bytes()
    if large:
      image = Image.open(io.BytesIO(data)).convert("RGB")
      scale = LARGE / min(image.size)
      size = tuple(round(n * scale) for n in image.size)
      file = io.BytesIO()
      image.resize(size, Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90
      )
      data = file.getvalue()
    (folder / f"{i:06d}.jpg").write_bytes(data)
    images.append((data, captions[0]))
    lines.append(json.dumps({"image": f"{i:06d}.jpg", "captions": captions}))
  (folder / "my.jsonl").write_text("\n".join(lines) + "\n")
  for shard in range(8):
    with tarfile.open(folder / "tars" / f"{shard:02d}.tar", "w") as tar:
      for i in range(shard, count, 8):
        data, caption = images[i]
        for suffix, content in (("jpg", data), ("txt", caption.encode())):
          info = tarfile.TarInfo(f"{i:06d}.{suffix}")
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  if large:
    return
  import datasets
  import litdata as ld

  dataset = datasets.Dataset.from_dict(
    {
      "image": [{"bytes": data, "path": None} for data, _ in images],
      "caption": [caption for _, caption in images],
    },
    features=datasets.Features(
      {"image": datasets.Image(), "caption": datasets.Value("string")}
    ),
  )
  dataset.save_to_disk(str(folder / "hf"))
  writer = [{"image": data, "caption": caption} for data, caption in images]
  ld.optimize(
    _same, writer, output_dir=str(folder / "litdata"), num_workers=1,
    chunk_bytes="16MB",
  )  # fmt: skip


def _same(row):
  return row


def _train_tokenizer(rows, path):
  from lavit_jax.core import vocabulary

  texts = [caption for _, captions in rows for caption in captions]
  vocabulary.TextTokenizer.train(texts, path, 500)


def _run(name, root, batches):
  """Prints images a second of a loader, in this process."""
  loader = LOADERS[name](root)
  for _ in range(WARM):
    next(loader)
  begun = time.monotonic()
  for _ in range(batches):
    next(loader)
  print(f"RATE {batches * BATCH / (time.monotonic() - begun)}", flush=True)
  # Workers that are left would keep the pipe to `_measure` open.
  os.killpg(os.getpgrp(), signal.SIGKILL)


def _measure(name, root, batches):
  started = subprocess.Popen(
    [sys.executable, __file__, "-", "--run", name, root, str(batches)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    out, err = started.communicate(timeout=120)
  except subprocess.TimeoutExpired:
    os.killpg(started.pid, signal.SIGKILL)
    print(f"{name} made no {batches + WARM} batches in two minutes")
    return None
  rates = [x for x in out.splitlines() if x.startswith("RATE ")]
  if not rates:
    print(f"{name} failed: {err.strip()[-300:]}")
    return None
  return float(rates[0].split()[1])


def _memory(root, minutes):
  """Prints the memory of our loader over some minutes."""
  import psutil

  me = psutil.Process()
  loader, begun, used = ours(root), time.monotonic(), []
  shown = begun
  for _ in loader:
    now = time.monotonic()
    if now > begun + 60 * minutes:
      break
    if now - begun > 30 and now > shown + 10:
      shown = now
      family = [me, *me.children(recursive=True)]
      used.append(sum(p.memory_info().rss for p in family) / 2**20)
      print(f"{now - begun:5.0f} s {used[-1]:.0f} MiB", flush=True)
  first, last = used[: len(used) // 4], used[-(len(used) // 4) :]
  change = statistics.mean(last) / statistics.mean(first) - 1
  print(
    f"memory: {min(used):.0f} to {max(used):.0f} MiB; the last quarter is"
    f" {change:+.1%} of the first"
  )
  os._exit(0)


def main():
  if "--run" in sys.argv:
    _, _, _, name, root, batches = sys.argv
    _run(name, root, int(batches))
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("photographs")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--batches", type=int, default=64)
  parser.add_argument("--large", action="store_true")
  parser.add_argument("--minutes", type=float, default=0)
  parser.add_argument("--loaders", default=",".join(LOADERS))
  args = parser.parse_args()
  path = pathlib.Path(args.photographs)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows = [(path.parent / row["image"], row["captions"]) for row in rows]
  with tempfile.TemporaryDirectory() as folder:
    os.environ["DATA_SPEED_TOKENIZER"] = f"{folder}/tokenizer.model"
    os.environ["LAVIT_INDEXES"] = f"{folder}/indexes"
    _train_tokenizer(rows, pathlib.Path(folder, "tokenizer.model"))
    root = pathlib.Path(folder, "data")
    _write(rows, root, args.large or args.minutes)
    if args.minutes:
      _memory(str(root), args.minutes)
    names = args.loaders.split(",")
    if args.large:
      names = ["ours", "ours_exact"]
    batches = 6 if args.large else args.batches
    rates = {name: [] for name in names}
    for k in range(args.rounds):
      for name in names:
        rate = _measure(name, str(root), batches)
        if rate:
          rates[name].append(rate)
      print(f"round {k + 1} of {args.rounds} is done", file=sys.stderr)
    found = {n: statistics.median(r) for n, r in rates.items() if r}
    ways = ("ours", "torchvision", "pillow")
    limits = {} if args.large else {w: _limit(str(root), w) for w in ways}
  best = (
    max(v for n, v in found.items() if not n.startswith("ours"))
    if not args.large
    else found["ours_exact"]
  )
  for name, rate in sorted(found.items(), key=lambda pair: -pair[1]):
    spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
    print(f"{name:20s} {rate:6.0f} images/s ({spread})")
  for way, limit in limits.items():
    print(f"limit, {way:13s} {limit:6.0f} images/s")
  ours_, name = max((v, n) for n, v in found.items() if n.startswith("ours"))
  print(f"{name} is {ours_ / best:.2f} x the fastest other")
  if limits:
    print(f"{name} is {ours_ / limits['ours']:.0%} of its limit")


if __name__ == "__main__":
  main()
