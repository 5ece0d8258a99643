"""Does a tiny model learn real photographs by heart?

Trains every stage it needs on 64 photographs through the jsonl source, and
counts how many are described by one of their own training captions, word for
word (aim: at least 90 %).

  python benchmarks/overfit_photos.py --data ../shared/data/A_coco/index.jsonl
"""

import argparse
import datetime
import importlib
import json
import pathlib
import platform
import shutil
import time

from lavit_jax.infer import pipeline
from lavit_jax.jobs import tokenize
from lavit_jax.train import loop

STEPS = {"encoder": 150, "tokenizer": 300, "pretrain": 900}


def main():
  """Trains, describes every photograph, prints the share and the time."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="JSON lines with captions")
  parser.add_argument("--workdir", default="runs/overfit_photos")
  parser.add_argument("--photos", type=int, default=64)
  args = parser.parse_args()
  root = pathlib.Path(args.workdir)
  data = subset(pathlib.Path(args.data), root / "data", args.photos)
  began = time.monotonic()
  train(root, data)
  rows = [json.loads(line) for line in data.read_text().splitlines()]
  paths = [str(data.parent / row["image"]) for row in rows]
  lavit = pipeline.LaVIT.load(root / "model")
  captions = lavit.caption(paths)
  right = [
    caption in row["captions"]
    for caption, row in zip(captions, rows, strict=True)
  ]
  for path, caption, ok in list(zip(paths, captions, right, strict=True))[:8]:
    print(f"{'+' if ok else '-'} {pathlib.Path(path).name}: {caption}")
  minutes = (time.monotonic() - began) / 60
  print(
    f"{sum(right)} of {len(right)} photographs ({sum(right) / len(right):.0%})"
    f" described exactly, {minutes:.1f} min, {platform.processor() or 'CPU'},"
    f" {datetime.date.today()}"
  )


def subset(source, folder, count):
  """The first `count` lines of a jsonl file with their images, in folder."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  with source.open() as file:
    for line in file:
      row = json.loads(line)
      name = pathlib.Path(row["image"]).name
      shutil.copyfile(source.parent / row["image"], folder / name)
      captions = [" ".join(c.split()) for c in row["captions"]]
      lines.append(json.dumps({"image": name, "captions": captions}))
      if len(lines) == count:
        break
  path = folder / "photos.jsonl"
  path.write_text("\n".join(lines) + "\n")
  return path


def train(root, data):
  """Encoder, tokenizer, code cache and LLM on the photographs alone."""
  for stage in ("encoder", "tokenizer", "pretrain"):
    module = importlib.import_module(f"lavit_jax.configs.tiny.{stage}")
    config = module.get_config()
    config.model_dir = str(root / "model")
    config.steps = STEPS[stage]
    config.batch_size = 32 if stage != "pretrain" else 16
    config.eval.batches = 1
    config.data.update(
      dict(kind="jsonl", path=str(data), held_out_path=str(data))
    )
    if stage == "pretrain":
      config.data.mixture = dict(image_text=1.0)
      config.data.cache_dir = str(root / "codes")
      config.data.held_out_cache_dir = str(root / "codes")
      tokenize.write_cache(
        config.model_dir, config.data.to_dict(), root / "codes"
      )
    loop.train(config, root / stage)


if __name__ == "__main__":
  main()
