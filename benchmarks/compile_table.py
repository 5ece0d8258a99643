"""The table of docs/compile.md: full-size runs, compiled for their pods.

  python benchmarks/compile_table.py [--only WORDS] [--json FILE]
  python benchmarks/compile_table.py --depths 8,32     compile time by depth

Every row is one `lavit compile` in a process of its own; none needs a TPU.
Takes 2 to 4 minutes a row on two idle cores. A finished row is kept in FILE
(build/compile_table.json), and taken from there when the table is made again,
as long as the code, the versions of jax and libtpu, and the row are the same.

Exit status 1, and what is wrong on stderr, if a row does not fit into 95 % of a
device's memory, took over 400 s to compile, or if what is computed before a
phase takes more memory than its step. SDXL's compile time is told, not held.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import lavit_jax
from lavit_jax.aot import executed, hlo, libtpu
from lavit_jax.core import progress
from lavit_jax.models import llama

_VOCAB = llama.LLAMA2_7B.padded_vocab
_MOST_S = 400.0  # to compile a step
_OUT = pathlib.Path(__file__).parents[1] / "build" / "compile_table.json"

_INT8 = "--config.model.llm.matmul=int8"
_512, _1024 = "--config.batch_size=512", "--config.batch_size=1024"
_MOST = "--config.model.llm.remat=most", "--config.optimizer.moments=bfloat16"
_NO_REMAT = "--config.model.unet.remat=none"


@dataclasses.dataclass(frozen=True)
class Row:
  """One row: a config of configs/lavit_7b, a topology, what else is said.

  `phases` has the steps of all phases compiled; the last one's is shown.
  """

  config: str
  topology: str
  overrides: tuple[str, ...] = ()
  phases: bool = False

  def __str__(self):
    return " ".join((f"{self.config}.py", self.topology, *self.overrides))


ROWS = (
  Row("pretrain", "v5e:16x16"),
  Row("pretrain", "v5e:16x16", (_INT8,)),
  Row("pretrain", "v5e:16x16", (_512, *_MOST)),
  Row("pretrain", "v5p:4x4x8"),
  Row("pretrain", "v5p:4x4x8", (_512,)),
  Row("pretrain", "v6e:16x16", (_512,)),
  Row("pretrain", "v6e:16x16", (_512, _INT8)),
  Row("pretrain", "v6e:16x16", (_1024,)),
  Row("pretrain", "tpu7x:4x4x4"),
  Row("pretrain", "tpu7x:4x4x4", (_1024,)),
  Row("tokenizer", "v5e:16x16", phases=True),
  Row("tokenizer", "tpu7x:4x4x4"),
  Row("pixels_sd15", "v5e:4x8"),
  Row("pixels_sd15", "tpu7x:2x2x4", (_NO_REMAT,)),  # 96 GB a device hold all
  Row("pixels_sdxl", "v6e:16x16"),
  Row("pixels_sdxl", "tpu7x:4x4x4"),
  Row("finetune", "v5e:2x4"),
  Row("finetune", "v6e:2x4"),
  Row("finetune", "tpu7x:2x2x1"),
)


def main() -> int:
  """Compiles the rows, prints them as a table; exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only", help="rows that have this: 'tokenizer.py tpu7x'"
  )
  parser.add_argument("--json", metavar="FILE", type=pathlib.Path, default=_OUT)
  parser.add_argument("--libtpu", metavar="PATH", help="as of lavit compile")
  parser.add_argument(
    "--depths", help="compile pretrain.py with so many layers, print seconds"
  )
  args = parser.parse_args()
  libtpu.use(args.libtpu)  # the commands below inherit it
  if args.depths:
    by_depth([int(depth) for depth in args.depths.split(",")])
    return 0
  rows = [row for row in ROWS if (args.only or "") in str(row)]
  found, wrong = [], []
  kept = Kept(args.json)
  with progress.Progress(len(rows), label="rows") as bar:
    for number, row in enumerate(rows):
      made = kept.row(row)
      found.append(made)
      wrong += [f"{row}: {one}" for one in made["wrong"]]
      bar.update(number + 1)
  print(table(rows, found))
  print("\n" + ", ".join(f"{k} {v}" for k, v in libtpu.versions().items()))
  for one in wrong:
    print(one, file=sys.stderr)
  return 1 if wrong else 0


class Kept:
  """Finished rows in a file, each under all that it depends on."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._rows = json.loads(path.read_text()) if path.exists() else {}
    self._versions, self._code = libtpu.versions(), code()

  def row(self, row: Row) -> dict:
    """A row of the file, or compiled now and written there."""
    key = json.dumps([str(row), row.phases, self._code, self._versions])
    if key not in self._rows:
      self._rows[key] = compiled(row)
      self._path.parent.mkdir(parents=True, exist_ok=True)
      part = self._path.with_suffix(".part")
      part.write_text(json.dumps(self._rows, indent=1))
      os.replace(part, self._path)  # an interrupted write loses nothing
    return self._rows[key]


def code() -> str:
  """A hash of the package and of the configs."""
  folder = pathlib.Path(lavit_jax.__file__).parent
  made = hashlib.sha256()
  for root in (folder, folder.parent / "configs"):
    for path in sorted(root.rglob("*.py")):
      made.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
  return made.hexdigest()[:16]


def by_depth(depths) -> None:
  """Compile times of the language model's step by its number of layers."""
  seconds = []
  for depth in depths:
    override = f"--config.model.llm.depth={depth}"
    made = compiled(Row("pretrain", "v5e:16x16", (override,)))
    seconds.append(made["compile_s"])
    print(
      f"{depth} layers: {seconds[-1]:.0f} s, {seconds[-1] / seconds[0]:.2f} x"
    )


def compiled(row: Row) -> dict:
  """The report of a row, and under "wrong" what it must not be, but is."""
  command = [sys.executable, "-m", "lavit_jax", "compile", "--json"]
  command += ["--config", f"lavit_7b/{row.config}.py"]
  command += ["--topology", row.topology]
  with tempfile.TemporaryDirectory() as folder:
    hlo_file = pathlib.Path(folder) / "hlo.txt"
    command += ["--phase", "all"] if row.phases else ["--hlo", str(hlo_file)]
    made = subprocess.run(
      [*command, *row.overrides],
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
    if not made.stdout:
      sys.exit(
        f"{row}: lavit compile ended with status {made.returncode}; see above."
        " -9: killed, most likely for want of memory. Rows that are done are"
        " kept: give the same command again."
      )
    found = json.loads(made.stdout)
    reports = found if row.phases else [found]
    text = hlo_file.read_text() if hlo_file.exists() else ""
  wrong = [
    fault
    for report in reports
    for fault in faults(report, told=row.config == "pixels_sdxl")
  ]
  if row.config == "pretrain" and text:
    wrong += pretrain_faults(reports[-1], text)
  phases = [
    {name: report[name] for name in ("program", "memory", "boundaries")}
    for report in reports
  ]
  return reports[-1] | {"phases": phases, "wrong": wrong}


def faults(report, *, told: bool) -> list[str]:
  """What no program may be: too large, or slow to compile if not told alone."""
  found = [*report["warnings"]]
  if not report["fits"]:
    found.append(f"does not fit: {report['why_not']}")
  if report["compile_s"] > _MOST_S and not told:
    found.append(f"compiled for {report['compile_s']:.0f} s")
  return [f"{report['program']}: {fault}" for fault in found]


def pretrain_faults(report, text: str) -> list[str]:
  """What the program of `pretrain` must not be, but is."""
  kernels = " ".join(report["kernels"])
  data, fsdp = report["mesh"]["data"], report["mesh"]["fsdp"]
  tokens = report["tokens_per_device"] * report["devices"] / (data * fsdp)
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
    "the encoder is differentiated": any(
      "transpose(jvp" in name for name in encoder
    ),
    "the encoder runs twice": any("rematted" in name for name in encoder),
    "no encoder": not encoder,
    "executes over 1.35 x": report["executed_over_model"] > 1.35,
  }
  return [name for name, failed in wrong.items() if failed]


def table(rows, found) -> str:
  """Markdown. A device is a chip; of TPU7x half a chip."""
  lines = [
    "| config | topology | tokens a device | HBM a device | before a phase"
    " | sent a device | executed / model | at best, s a step | MFU at best"
    " | compile |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row, made in zip(rows, found, strict=True):
    extra = "".join(f" `{one}`" for one in row.overrides)
    start = (
      f"| `{row.config}.py`{extra} | {row.topology}"
      f" | {made['tokens_per_device']:,.0f}"
    )
    if not made["memory"]:
      lines.append(f"{start} | does not fit ||||||||")
      continue
    memory, line = made["memory"], made["roofline"]
    start += (
      f" | {memory['total'] / 1e9:.1f} GB, {memory['share']:.0%}"
      f" | {before(made)}"
    )
    if made["unread"]:
      lines.append(f"{start} | program not read ||||||")
      continue
    sent = sum(one["bytes"] for one in made["collectives"])
    lines.append(
      f"{start} | {sent / 1e9:.0f} GB | {made['executed_over_model']:.2f} |"
      f" {line['step_s']:.2f} - {line['step_s_no_overlap']:.2f} |"
      f" {line['mfu']:.0%} - {line['mfu_no_overlap']:.0%} |"
      f" {made['compile_s']:.0f} s |"
    )
  return "\n".join(lines)


def before(made) -> str:
  """The most memory that something takes before one of the row's phases."""
  programs = [one for phase in made["phases"] for one in phase["boundaries"]]
  if not all(one["memory"] for one in programs):
    return "does not fit"
  most = max((one["memory"]["total"] for one in programs), default=0.0)
  return f"{most / 1e9:.1f} GB"


if __name__ == "__main__":
  sys.exit(main())
