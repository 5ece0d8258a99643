"""Peak memory of `lavit port import` on a source of several gigabytes.

  python benchmarks/import_memory.py [--gigabytes 4.2] [--dtype keep] [--export]

Makes a LLaMA of random half-precision weights in 4 shards with an index, in a
temporary folder that is removed at the end, imports it in a process of its own
and samples that process's anonymous memory (RssAnon of /proc/PID/status; pages
of mapped files can be dropped at any time and do not count). The bound is 2 x
the largest array as stored here, layers stacked, + 1.5 GB. With --export the
model is written back as a Hugging Face folder and measured too. Needs about
three times the size on disk; Linux only. Exit status 1 above the bound.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from lavit_jax.core import vocabulary
from lavit_jax.infer.loading import parts
from lavit_jax.models import llama
from lavit_jax.port.formats import llama_folder, tensor_files
from lavit_jax.port.tables import names, sizes

SHARDS = 4
WIDTH, MLP = 2048, 5504
EXTRA = 1.5e9
_EVERY = 0.01  # seconds between samples


def config_of(gigabytes: float, text_size: int) -> llama.LlamaConfig:
  """A LLaMA whose half-precision weights are at least so large."""
  layer = 4 * WIDTH**2 + 3 * WIDTH * MLP
  depth = -(-int(gigabytes * 1e9) // (2 * layer))
  return llama.LlamaConfig(
    vocab_size=text_size,
    width=WIDTH,
    depth=depth,
    num_heads=16,
    num_kv_heads=16,
    mlp_dim=MLP,
  )


def make_source(folder: pathlib.Path, gigabytes: float) -> int:
  """Writes the LLaMA folder; its bytes of weights."""
  words = parts.resolve("tiny")
  words = words / "tokenizer.model"
  text_size = vocabulary.TextTokenizer.load(words).size
  config = config_of(gigabytes, text_size)
  folder.mkdir()
  shutil.copy(words, folder / "tokenizer.model")
  content = llama_folder.config_json(config, "float16")
  (folder / "config.json").write_text(json.dumps(content))
  shapes = names.to_official(
    names.LLM, sizes.abstract_llama(config), vocab_size=text_size
  )
  half = np.dtype(np.float16)
  specs = [tensor_files.Spec(n, x.shape, half) for n, x in shapes.items()]
  total = sum(spec.nbytes for spec in specs)
  limit = total // SHARDS + max(spec.nbytes for spec in specs)
  files = tensor_files.shards(specs, limit, "pytorch_model", ".bin")
  generator = torch.Generator().manual_seed(0)
  for file, group in files.items():
    state = {
      spec.name: torch.empty(spec.shape, dtype=torch.float16).normal_(
        std=0.02, generator=generator
      )
      for spec in group
    }
    torch.save(state, folder / file)
  index = folder / "pytorch_model.bin.index.json"
  index.write_bytes(tensor_files.index_json(files))
  return total


def anonymous(pid: int) -> int:
  """Bytes of anonymous memory of a process, 0 when it is gone."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return 0
  found = [line.split()[1] for line in text.splitlines() if "RssAnon" in line]
  return int(found[0]) * 1024 if found else 0


def watch(arguments) -> tuple[dict, int, float]:
  """Runs `lavit` and gives its JSON, peak memory and seconds."""
  start, peak = time.monotonic(), 0
  command = [sys.executable, "-m", "lavit_jax", *map(str, arguments), "--json"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
    while child.poll() is None:
      peak = max(peak, anonymous(child.pid))
      time.sleep(_EVERY)
    output = child.stdout.read()
  if child.returncode:
    raise SystemExit(f"{' '.join(command)} failed")
  return json.loads(output), peak, time.monotonic() - start


def main() -> int:
  """Makes the source, imports it, prints peak and bound."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gigabytes", type=float, default=4.2)
  parser.add_argument("--dtype", default="keep")
  parser.add_argument("--export", action="store_true")
  parser.add_argument("--folder", help="where to make the temporary folder")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    folder = pathlib.Path(folder)
    size = make_source(folder / "source", args.gigabytes)
    shards = len(list((folder / "source").glob("*.bin")))
    print(f"source: {size / 1e9:.2f} GB in {shards} shards", flush=True)
    target = folder / "model"
    report, peak, seconds = watch(
      ["port", "import", folder / "source", target, "--dtype", args.dtype]
    )
    largest = report["parts"]["llm"]["largest_array_bytes"]
    bound = 2 * largest + EXTRA
    print(
      f"import: peak {peak / 1e9:.2f} GB of anonymous memory, bound"
      f" {bound / 1e9:.2f} GB (largest array {largest / 1e9:.2f} GB),"
      f" {seconds:.0f} s"
    )
    good = peak <= bound
    if args.export:
      back = ["port", "export", target, folder / "hf", "--format"]
      _, peak, seconds = watch([*back, "huggingface"])
      print(f"export: peak {peak / 1e9:.2f} GB, {seconds:.0f} s")
      good = good and peak <= bound
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
