"""The commands for other formats: `lavit port import`, `export`, `verify`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import common

with epy.lazy_imports():
  from lavit_jax.port import exporting, importing
  from lavit_jax.port.verify import verify


def add(subparsers: Any) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = subparsers.add_parser(
    "port",
    help="convert weights from and to PyTorch and Hugging Face",
    description="Official PyTorch and Hugging Face weights <-> lavit_jax.",
    formatter_class=common.FORMATTER,
  )
  actions = parser.add_subparsers(
    title="actions", metavar="ACTION", required=True
  )
  _add_import(actions)
  _add_export(actions)
  _add_verify(actions)


def _add_import(actions):
  """Adds `lavit port import`."""
  parser = common.command(
    actions,
    "import",
    _import,
    "make a model directory from a checkpoint",
    """\
    SRC is a directory in the official layout (visual_tokenizer/,
    language_model/, pixel_decoding/, highres_pixel_decoding/), its id on the
    Hugging Face hub, or weights to start training from: a plain LLaMA folder,
    an EVA-CLIP file, a folder or id of Stable Diffusion 1.5 or SDXL (the part
    lowres_pixels or highres_pixels). DST appears only when all of it is
    written.

    examples:
      lavit port import rain1011/LaVIT-7B-v2 runs/lavit_7b --dtype bfloat16
      lavit port import LaVIT-7B-v2 runs/lavit_7b --only encoder,tokenizer
      lavit port import Llama-2-7b-hf runs/llama --codes 16384
      lavit port import eva_vitg_psz14.bin runs/eva
      lavit port import stable-diffusion-v1-5 runs/sd --only lowres_pixels
    """,
  )
  parser.add_argument("source", metavar="SRC")
  parser.add_argument("destination", metavar="DST")
  parser.add_argument(
    "--only",
    type=_parts,
    metavar="PARTS",
    help="some of encoder, tokenizer, llm, lowres, highres, lowres_pixels,"
    " highres_pixels, safety, as in the example; by default all that SRC has",
  )
  parser.add_argument(
    "--dtype",
    default="keep",
    choices=("keep", "float32", "bfloat16", "float16"),
    help="keep the dtype of the files (the default), or cast to this one",
  )
  parser.add_argument(
    "--heads",
    type=int,
    metavar="N",
    help="attention heads of the visual networks; by default those of"
    " variant_config.json, else 16",
  )
  parser.add_argument(
    "--allow-missing",
    nargs="+",
    action="extend",
    default=[],
    metavar="NAME",
    help="tensors that may be missing: a bias becomes 0, a norm's scale 1",
  )
  parser.add_argument(
    "--codes",
    type=int,
    metavar="K",
    help="visual codes by which a plain LLaMA's vocabulary grows (16384)",
  )
  parser.add_argument(
    "--seed", type=int, default=0, help="seed of a plain LLaMA's new rows"
  )


def _add_export(actions):
  parser = common.command(
    actions,
    "export",
    _export,
    "write a model directory as PyTorch files",
    """\
    official: the layout of LaVIT-7B-v2, for the official PyTorch classes.
    huggingface: DST/llm, a LlamaForCausalLM folder, the visual tokenizer as
    one safetensors file with its config beside it, and the pixel decoders in
    latents as folders that diffusers loads.

    examples:
      lavit port export runs/lavit_7b back --format official
      lavit port export tiny tiny_hf --format huggingface
    """,
  )
  parser.add_argument("model", metavar="MODEL", help='a directory, or "tiny"')
  parser.add_argument("destination", metavar="DST")
  parser.add_argument(
    "--format", required=True, choices=("official", "huggingface")
  )


def _add_verify(actions):
  parser = common.command(
    actions,
    "verify",
    _verify,
    "compare a model with recorded numbers of the official code",
    """\
    Exit status 1 if anything fails. All recorded arrays are compared. The
    sizes of the checkpoint and the allowed lengths are read from them.

    example:
      lavit port verify runs/lavit_a golden/a
    """,
    compiles=True,
  )
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("golden", metavar="GOLDEN_DIR")


def _parts(text: str) -> list[str]:
  return [part.strip() for part in text.split(",") if part.strip()]


def _import(args: argparse.Namespace) -> None:
  report = importing.run(
    args.source,
    args.destination,
    only=args.only,
    dtype=args.dtype,
    heads=args.heads,
    allow_missing=args.allow_missing,
    codes=args.codes,
    seed=args.seed,
  )
  lines = [
    f"{name}: {part['parameters']:,} parameters, {_size(part['bytes'])},"
    f" {', '.join(part['dtypes'])}"
    for name, part in report["parts"].items()
  ]
  lines += [*report["notes"], f"written to {report['directory']}"]
  common.print_answer(args, report, lines)


def _export(args: argparse.Namespace) -> None:
  report = exporting.run(args.model, args.destination, format=args.format)
  lines = [
    f"{name}: {file['tensors']} tensors, {_size(file['bytes'])}"
    for name, file in report["files"].items()
  ]
  lines += [*report["notes"], f"written to {report['directory']}"]
  common.print_answer(args, report, lines)


def _size(count: int) -> str:
  return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.2f} MB"


def _verify(args: argparse.Namespace) -> int:
  common.keep_programs(args)
  rows = verify.run(args.model, args.golden)
  counts = {
    status: sum(row.status == status for row in rows)
    for status in ("pass", "fail")
  }
  document = {"rows": [dataclasses.asdict(row) for row in rows]} | counts
  summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
  common.print_answer(args, document, [*_table(rows), summary or "no arrays"])
  return 1 if counts["fail"] else 0


_COLUMNS = ("file", "array", "max_abs", "max_rel", "tolerance", "status")


def _table(rows: Sequence) -> list[str]:
  """Returns aligned lines, one for each row; the note comes last."""
  cells = [list(_COLUMNS) + ["note"]]
  for row in rows:
    values = [_cell(getattr(row, column)) for column in _COLUMNS]
    cells.append([*values, row.note or ""])
  widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
  numbers = {"max_abs", "max_rel", "tolerance"}
  lines = []
  for line in cells:
    padded = [
      value.rjust(width) if column in numbers else value.ljust(width)
      for value, width, column in zip(line, widths, _COLUMNS, strict=False)
    ]
    lines.append("  ".join([*padded, line[-1]]).rstrip())
  return lines


def _cell(value) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.1e}" if value else "0"
  return str(value)
