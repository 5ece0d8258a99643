"""README's table of the full-size runs, compiled for the pods they are for.

  python benchmarks/compile_table.py [--only pretrain] [--json FILE]
  python benchmarks/compile_table.py --depths 8,32     compile time by depth

Every row is one `lavit compile` in a process of its own; none needs a TPU.
Takes 2 to 4 minutes a row on two cores.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

from lavit_jax import progress
from lavit_jax.models import llama
from lavit_jax.train import executed, hlo

_VOCAB = llama.LLAMA2_7B.padded_vocab

_INT8 = "--config.model.llm.matmul=int8"
ROWS = (
  ("pretrain", "v5e:16x16", ()),
  ("pretrain", "v5e:16x16", (_INT8,)),
  ("pretrain", "v5p:4x4x8", ()),
  ("pretrain", "v6e:16x16", ("--config.batch_size=512",)),
  ("pretrain", "v6e:16x16", ("--config.batch_size=512", _INT8)),
  ("tokenizer", "v5e:16x16", ()),
  ("pixels_sdxl", "v6e:16x16", ()),
  ("finetune", "v5e:2x4", ()),
  ("finetune", "v6e:2x4", ()),
)


def main():
  """Compiles the rows, prints them as a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", help="rows whose config has this in its name")
  parser.add_argument("--json", metavar="FILE", help="write all figures there")
  parser.add_argument(
    "--depths", help="compile pretrain.py with so many layers, print seconds"
  )
  args = parser.parse_args()
  if args.depths:
    by_depth([int(depth) for depth in args.depths.split(",")])
    return
  rows = [row for row in ROWS if not args.only or args.only in row[0]]
  found = []
  with progress.Progress(len(rows), label="rows") as bar:
    for number, row in enumerate(rows):
      found.append(compiled(*row))
      bar.update(number + 1)
      if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
  print(table(rows, found))


def by_depth(depths) -> None:
  """Compile times of the language model's step by its number of layers."""
  seconds = []
  for depth in depths:
    override = f"--config.model.llm.depth={depth}"
    made = compiled("pretrain", "v5e:16x16", (override,))
    seconds.append(made["compile_s"])
    print(
      f"{depth} layers: {seconds[-1]:.0f} s, {seconds[-1] / seconds[0]:.2f} x"
    )


def compiled(name: str, topology: str, overrides) -> dict:
  """The report of one row."""
  command = [sys.executable, "-m", "lavit_jax", "compile"]
  command += ["--config", f"lavit_7b/{name}.py", "--topology", topology]
  with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder) / "hlo.txt"
    made = subprocess.run(
      [*command, "--json", "--hlo", str(text), *overrides],
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
    if not made.stdout:
      sys.exit(f"{name} on {topology}: lavit compile failed; see above.")
    report = json.loads(made.stdout)
    if name == "pretrain" and text.exists():
      check(report, text.read_text())
  return report


def check(report, text: str) -> None:
  """Says on stderr what the program of `pretrain` must not be, but is."""
  kernels = " ".join(report["kernels"])
  data, fsdp = report["mesh"]["data"], report["mesh"]["fsdp"]
  tokens = report["tokens_per_chip"] * report["chips"] / (data * fsdp)
  vocab = _VOCAB // report["mesh"]["tensor"]
  logits = max(
    (
      math.prod(dims) / dims[-1]
      for dtype, dims in executed.arrays(hlo.read(text))
      if dtype == "f32" and dims and dims[-1] == vocab
    ),
    default=0,
  )
  names = set(re.findall(r'op_name="([^"]*)"', text))
  encoder = [name for name in names if "EvaVit" in name]
  wrong = {
    "no splash kernel": not all(k in kernels for k in ("mha_fwd", "mha_dkv")),
    "all logits in float32": logits >= tokens,
    "the encoder is differentiated": any("transpose" in n for n in encoder),
    "the encoder runs twice": any("rematted" in name for name in encoder),
    "no encoder": not encoder,
    "compiled for over 400 s": report["compile_s"] > 400,
    "does not fit": not report["fits"],
    "executes over 1.35 x": report["executed_over_model"] > 1.35,
  }
  if failed := [name for name, failed in wrong.items() if failed]:
    print(f"{report['topology']}: {', '.join(failed)}", file=sys.stderr)


def table(rows, found) -> str:
  """Markdown."""
  lines = [
    "| config | topology | tokens a chip | HBM a chip | sent a chip"
    " | executed / model | at best, s a step | MFU at best | compile |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for (name, topology, overrides), made in zip(rows, found, strict=True):
    extra = "".join(f" `{one}`" for one in overrides)
    start = (
      f"| `{name}.py`{extra} | {topology} | {made['tokens_per_chip']:,.0f}"
    )
    if not made["memory"]:
      lines.append(f"{start} | does not fit |||||||")
      continue
    memory, line = made["memory"], made["roofline"]
    if made["unread"]:
      share = f"{memory['total'] / 1e9:.1f} GB, {memory['share']:.0%}"
      lines.append(f"{start} | {share} | program not read |||||")
      continue
    sent = sum(one["bytes"] for one in made["collectives"])
    lines.append(
      f"{start} | {memory['total'] / 1e9:.1f} GB, {memory['share']:.0%} |"
      f" {sent / 1e9:.0f} GB | {made['executed_over_model']:.2f} |"
      f" {line['step_s']:.2f} - {line['step_s_no_overlap']:.2f} |"
      f" {line['mfu']:.0%} - {line['mfu_no_overlap']:.0%} |"
      f" {made['compile_s']:.0f} s |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
