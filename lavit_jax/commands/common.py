"""What the commands share: options, checks before loading, and printing."""

import argparse
import errno
import functools
import json
import math
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from lavit_jax.core import compiled_programs, errors
from lavit_jax.core.storage import files

FORMATTER = functools.partial(
  argparse.RawDescriptionHelpFormatter, max_help_position=28
)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def version() -> str:
  """The installed version of the package."""
  try:
    return metadata.version("lavit_jax")
  except metadata.PackageNotFoundError:  # run from a checkout
    return "not installed"


def command(
  subparsers,
  name: str,
  run: Callable[[argparse.Namespace], None],
  summary: str,
  details: str,
  compiles: bool = False,
) -> argparse.ArgumentParser:
  """The parser of a command that `run` carries out, with `--json`.

  Args:
    subparsers: of `lavit`.
    name: of the command.
    run: what it does.
    summary: of one line, in the list of commands too.
    details: the end of its help.
    compiles: whether the help says where compiled programs are kept.
  """
  parser = subparsers.add_parser(
    name,
    help=summary,
    description=f"{summary[0].upper()}{summary[1:]}.",
    epilog=textwrap.dedent(details)
    + (f"\n{compiled_programs.HELP}" if compiles else ""),
    formatter_class=FORMATTER,
  )
  json_help = "print one JSON document"
  parser.add_argument("--json", action="store_true", help=json_help)
  parser.set_defaults(run=run)
  return parser


def add_model(parser: argparse.ArgumentParser) -> None:
  """Adds `--model` and how it is loaded."""
  parser.add_argument(
    "--model",
    default="tiny",
    metavar="PATH",
    help='a model directory, or "tiny", the one shipped here (the default)',
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of weights and computation (float32)",
  )
  parser.add_argument(
    "--quantize",
    choices=("int8",),
    help="keep the language model's weights as int8",
  )


def add_parity(parser: argparse.ArgumentParser) -> None:
  """Adds `--parity`."""
  parser.add_argument(
    "--parity",
    action="store_true",
    default=None,
    help="with the quirks of the official code (see infer/pipeline.py)",
  )


def add_writing(parser: argparse.ArgumentParser) -> None:
  """Adds the options of what writes texts; the model has its own defaults."""
  group = parser.add_argument_group(
    "how texts are written (by default as the model wants it)"
  )
  for flag, name, meaning in (
    ("--beams", "num_beams", "beams; 1 is greedy"),
    ("--min-tokens", "min_new_tokens", "tokens at least"),
    ("--max-tokens", "max_new_tokens", "tokens at most"),
  ):
    group.add_argument(flag, type=int, metavar="N", dest=name, help=meaning)
  group.add_argument(
    "--length-penalty",
    type=number,
    metavar="X",
    help="of beams; above 0 prefers long texts",
  )
  group.add_argument(
    "--seed",
    type=int,
    metavar="N",
    help="sample which patches are read, instead of the likeliest",
  )
  add_parity(group)


WRITING = (
  "num_beams",
  "min_new_tokens",
  "max_new_tokens",
  "length_penalty",
  "seed",
  "parity",
)


def number(text: str) -> float:
  """A finite number of the command line."""
  value = float(text)  # argparse names the option of a ValueError
  if not math.isfinite(value):
    raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
  return value


def require_text(what: str, given: Sequence[str], hint: str) -> None:
  """UsageError for the first that is an image file where text is expected."""
  for text in given:
    there = text.startswith("gs://") or os.path.isfile(text)
    if text.lower().endswith(SUFFIXES) and there:
      raise errors.UsageError(
        f"{text} is an image, but {what} (text) is expected there. {hint}"
      )


def add_images(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
  """Adds the positional `images`."""
  parser.add_argument(
    "images", nargs=nargs, metavar="IMAGE", help="an image file"
  )


def add_data_fields(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `--data`, for `data_fields`."""
  parser.add_argument(
    "--allow-absolute",
    action="store_true",
    default=None,
    help="with --data: images may lie outside the file's folder",
  )
  parser.add_argument(
    "--limit-share",
    type=number,
    metavar="X",
    help="with --data: share of bad lines or images that is an error (0.05)",
  )


def data_fields(args: argparse.Namespace) -> dict[str, Any]:
  """Fields of config.data that were given beside `--data`.

  Raises:
    errors.UsageError: they were given without `--data`.
  """
  fields = given(args, "allow_absolute", "limit_share")
  if fields and not args.data:
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in fields)
    raise errors.UsageError(f"{flags} goes with --data FILE.")
  return fields


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """The named options that were given."""
  values = {name: getattr(args, name, None) for name in names}
  return {name: value for name, value in values.items() if value is not None}


def print_answer(
  args: argparse.Namespace, document: Any, lines: Sequence[str]
) -> None:
  """Prints `document` as JSON if that was asked for, else `lines`."""
  if args.json:
    print(json.dumps(document, indent=2, ensure_ascii=False))
  else:
    print("\n".join(lines))


def load(args: argparse.Namespace, **options):
  """The `LaVIT` of `--model`, with further options of `LaVIT.load`."""
  from lavit_jax.infer import pipeline

  compiled_programs.keep()
  return pipeline.LaVIT.load(
    args.model, dtype=args.dtype, quantize=args.quantize, **options
  )


def note_scenes(args: argparse.Namespace, paths: Sequence[str]) -> None:
  """Says once, on stderr, that a model of drawn scenes knows no photographs.

  What a model was trained on stands in its encoder. Nothing is said with
  --json, nor of images that are exactly as large as its scenes.
  """
  if args.json or not paths:
    return
  from lavit_jax.core import image_io
  from lavit_jax.core.storage import checkpoints
  from lavit_jax.infer.loading import parts

  meta = checkpoints.read_meta(parts.resolve(args.model), "encoder")
  data = meta.get("config", {}).get("data", {})
  if data.get("kind") != "shapes":
    return
  if all(image_io.size_of(p) == (data["image_size"],) * 2 for p in paths):
    return
  print(
    f"lavit: {args.model} has seen nothing but drawn scenes of coloured shapes"
    f" ({data['image_size']} x {data['image_size']} pixels) and takes whatever"
    " it is shown for one. For photographs give another model: --model DIR"
    " (one that was imported, see lavit port import --help, or that you have"
    " trained).",
    file=sys.stderr,
  )


def require_files(paths: Sequence[str]) -> None:
  """FileNotFoundError for the first that is missing, before anything loads."""
  for path in paths:
    if not files.place(path).exists():
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def outputs(
  out: str, count: int, read: Sequence[str] = (), option: str = "--out"
) -> list[pathlib.Path]:
  """Where to draw `count` images: out.png, or out_0.png, out_1.png, ….

  Args:
    out: the name given.
    count: of images.
    read: names of the images that are read, none of which is written over.
    option: what the name was given as.

  Raises:
    errors.UsageError: the name does not end as an image's, or one of them is
      read.
  """
  files.require_local(out, "an image")
  path = pathlib.Path(out)
  if path.suffix.lower() not in SUFFIXES:
    raise errors.UsageError(
      f"{option} {out} does not end in an image format; expected one of"
      f" {' '.join(SUFFIXES)}. Try {option} {path.with_suffix('.png')}."
    )
  paths = [path]
  if count > 1:
    digits = len(str(count - 1))
    paths = [
      path.with_name(f"{path.stem}_{i:0{digits}d}{path.suffix}")
      for i in range(count)
    ]
  originals = {os.path.realpath(name) for name in read}
  for path in paths:
    if os.path.realpath(path) in originals:
      raise errors.UsageError(
        f"{option} {out} would write over {path}, which is read. Give another"
        f" {option}."
      )
  return paths


def save(images, paths: Sequence[pathlib.Path]) -> None:
  """Writes PIL images, making the folders that are missing."""
  for image, path in zip(images, paths, strict=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
