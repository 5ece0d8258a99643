"""Shared by the commands: options, checks before loading, and printing."""

import argparse
import errno
import functools
import json
import math
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epy

from lavit_jax.core import compiled_programs, errors
from lavit_jax.core.storage import files

with epy.lazy_imports():
  from lavit_jax.core import image_io
  from lavit_jax.core.storage import checkpoints
  from lavit_jax.data.indexes import archives
  from lavit_jax.data.sources import kinds
  from lavit_jax.data.sources.tables import json_lines, parquet
  from lavit_jax.infer import pipeline
  from lavit_jax.infer.loading import parts

FORMATTER = functools.partial(
  argparse.RawDescriptionHelpFormatter, max_help_position=28
)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def command(
  subparsers: Any,
  name: str,
  run: Callable[[argparse.Namespace], int | None],
  summary: str,
  details: str,
  compiles: bool = False,
) -> argparse.ArgumentParser:
  """Returns the parser of a new command, with the option `--json`.

  Args:
    subparsers: what `add_subparsers` of the parent parser returned.
    name: of the command.
    run: carries the command out; returns the exit status, None for 0.
    summary: one line, for the list of commands and the head of the help.
    details: the end of the help.
    compiles: whether the command compiles programs. Then its help says where
      they are kept, and `--no-cache` keeps none.
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
  if compiles:
    parser.add_argument(
      "--no-cache",
      action="store_true",
      help="keep no compiled programs and use none that were kept",
    )
  parser.set_defaults(run=run)
  return parser


def add_model(parser: argparse.ArgumentParser) -> None:
  """Adds `--model` and the options of loading it."""
  parser.add_argument(
    "--model",
    default="tiny",
    metavar="PATH",
    help='a model directory, or "tiny", the shipped model (the default)',
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


def add_parity(parser: argparse._ActionsContainer) -> None:
  """Adds `--parity`."""
  parser.add_argument(
    "--parity",
    action="store_true",
    default=None,
    help="reproduce the quirks of the official code (see infer/pipeline.py)",
  )


def add_writing(parser: argparse.ArgumentParser) -> None:
  """Adds the options of text generation; the model's preset has defaults."""
  group = parser.add_argument_group(
    "how texts are generated (by default as the model's preset says)"
  )
  for flag, name, least, meaning in (
    ("--beams", "num_beams", 1, "beams; 1 is greedy"),
    ("--min-tokens", "min_new_tokens", 0, "shortest text, in tokens"),
    ("--max-tokens", "max_new_tokens", 1, "longest text, in tokens"),
  ):
    group.add_argument(
      flag, type=integer(least), metavar="N", dest=name, help=meaning
    )
  group.add_argument(
    "--length-penalty",
    type=number,
    metavar="X",
    help="for beams; above 0 prefers long texts",
  )
  group.add_argument(
    "--seed",
    type=SEED,
    metavar="N",
    help="sample the patches that are kept, instead of the most probable",
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


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
  """Returns the type of an option that is an integer in a range.

  Args:
    least: the smallest that is allowed.
    most: the largest; None: there is no limit.
  """

  def parse(text):
    value = int(text)  # argparse names the option of a ValueError
    if value < least or (most is not None and value > most):
      bounds = f"{least} or more" if most is None else f"{least} to {most}"
      raise argparse.ArgumentTypeError(f"{text}: expected {bounds}")
    return value

  parse.__name__ = "integer"  # what argparse calls it in the message
  return parse


SEED = integer(0, 2**31 - 1)  # as `infer/ranges.py` says


def positive(text: str) -> float:
  """Parses a finite number above 0 of the command line."""
  value = number(text)
  if value <= 0:
    raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
  return value


def number(text: str) -> float:
  """Parses a finite number of the command line."""
  value = float(text)  # argparse names the option of a ValueError
  if not math.isfinite(value):
    raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
  return value


def share(text: str) -> float:
  """Parses a share, 0 to 1, of the command line."""
  value = number(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text}: expected a share, 0 to 1")
  return value


def require_text(what: str, texts: Sequence[str], hint: str) -> None:
  """Checks that no text is the name of an image file.

  Args:
    what: a noun with its article, for the message: "a prompt".
    texts: the words of the command line.
    hint: a sentence that says what to do instead.

  Raises:
    errors.UsageError: one of them is an image that exists.
  """
  for text in texts:
    exists = text.startswith("gs://") or os.path.isfile(text)
    if text.lower().endswith(SUFFIXES) and exists:
      raise errors.UsageError(
        f"{text} is an image, but {what} (text) is expected there. {hint}"
      )


def add_images(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
  """Adds the positional `images`."""
  parser.add_argument(
    "images", nargs=nargs, metavar="IMAGE", help="an image file"
  )


def add_data_fields(parser: argparse.ArgumentParser) -> None:
  """Adds the options that go with `--data`; `data_fields` reads them."""
  parser.add_argument(
    "--allow-absolute",
    action="store_true",
    default=None,
    help="with --data: allow images outside the file's folder",
  )
  parser.add_argument(
    "--limit-share",
    type=share,
    metavar="X",
    help="with --data: largest share of bad lines or images (0.05)",
  )
  for name, meaning in (("image", "images"), ("text", "words")):
    parser.add_argument(
      f"--{name}-feature",
      metavar="NAME",
      help=f"with --data: column or field of the {meaning}, where it is not"
      " found by itself (Parquet, folders of datasets, JSON lines)",
    )


def data_fields(args: argparse.Namespace) -> dict[str, Any]:
  """Returns the fields of config.data that go with `--data` and are set.

  Raises:
    errors.UsageError: they are set without `--data`.
  """
  fields = chosen(
    args, "allow_absolute", "limit_share", "image_feature", "text_feature"
  )
  if fields and not args.data:
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in fields)
    raise errors.UsageError(f"{flags} goes with --data FILE.")
  return fields


def chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """Returns those of the named options that the user has set."""
  values = {name: getattr(args, name, None) for name in names}
  return {name: value for name, value in values.items() if value is not None}


def print_answer(
  args: argparse.Namespace, document: Any, lines: Sequence[str]
) -> None:
  """Prints `document` as JSON with `--json`, else `lines`."""
  if args.json:
    print(json.dumps(document, indent=2, ensure_ascii=False))
  else:
    print("\n".join(lines))


def keep_programs(args: argparse.Namespace, **options: Any) -> None:
  """Keeps compiled programs, or none with `--no-cache`.

  Args:
    args: of a command that compiles.
    **options: of `compiled_programs.keep`.
  """
  if args.no_cache:
    compiled_programs.keep_none()
  else:
    compiled_programs.keep(**options)


# So much work takes less time than to compile for it with all optimizations
# (docs/benchmarks.md, "First seconds"): images, and parameters of the model.
_FEW_IMAGES, _FEW_PARAMETERS = 8, 10_000_000


def load(
  args: argparse.Namespace,
  *,
  images: int | None = None,
  check_safety: bool = True,
) -> "pipeline.LaVIT":
  """Opens the model of `--model`.

  Args:
    args: with the options of `add_model`.
    images: that the command reads or makes, or texts that it writes. For few
      of them a small model is compiled quickly, to run less fast. None: many.
    check_safety: see `LaVIT.load`.
  """
  if "no_cache" in args:
    keep_programs(args)
  lavit = pipeline.LaVIT.load(
    args.model,
    dtype=args.dtype,
    quantize=args.quantize,
    check_safety=check_safety,
  )
  few = images is not None and images <= _FEW_IMAGES
  if few and lavit.num_parameters <= _FEW_PARAMETERS:
    compiled_programs.compile_quickly()
  return lavit


def note_scenes(args: argparse.Namespace, paths: Sequence[str]) -> None:
  """Warns on stderr that a model trained on drawn scenes knows no photographs.

  The training data are those in the metadata of the encoder. There is no
  warning with `--json`, nor for images of exactly the size of the scenes.

  Args:
    args: with `--model` and `--json`.
    paths: of the images that the model is to read.
  """
  if args.json or not paths:
    return
  meta = checkpoints.read_meta(parts.resolve(args.model), "encoder")
  data = meta.get("config", {}).get("data", {})
  if data.get("kind") != "shapes":
    return
  if all(image_io.size_of(p) == (data["image_size"],) * 2 for p in paths):
    return
  print(
    f"lavit: {args.model} was trained only on drawn scenes of coloured shapes"
    f" ({data['image_size']} x {data['image_size']} pixels) and reads every"
    " image as one. For photographs give another model: --model DIR (imported,"
    " see lavit port import --help, or trained by you).",
    file=sys.stderr,
  )


def require_files(paths: Sequence[str], *, several: bool = False) -> None:
  """Checks that files are there.

  Args:
    paths: of the files.
    several: whether the command takes several, for the message.

  Raises:
    FileNotFoundError: a path does not exist.
    errors.UsageError: it is a folder.
  """
  for path in paths:
    if not files.input_path(path).exists():
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not files.is_remote(path) and os.path.isdir(path):
      hint = (
        f" For the files in it give {os.path.join(path, '*')}, which the shell"
        " replaces by their names."
      )
      raise errors.UsageError(
        f"{path} is a folder, but a file is expected.{hint if several else ''}"
      )


def require_data(path: str) -> None:
  """Checks that the data of `--data` are there.

  Args:
    path: a file, or what `kinds.kind_of` knows: tar archives or Parquet files,
      one, a folder of them, or a pattern; or a folder of `datasets`.

  Raises:
    FileNotFoundError: a file does not exist.
    errors.LavitError: it is another folder, or a pattern that names nothing.
  """
  kind = kinds.kind_of(path)
  if kind in ("hf", "arrayrecord"):  # it exists: that is how it was known
    return
  if kind == "jsonl" and json_lines.is_meant(path):
    path, *_ = map(os.fspath, json_lines.files_of(path))
  if kind == "parquet":
    require_files([os.fspath(one) for one in parquet.files_of(path)])
    return
  if kind != "webdataset":
    require_files([path])
    return
  if kinds.is_empty(path):
    raise errors.DataError(kinds.nothing_in(path))
  first, *_ = archives.of(path)
  if not first.exists():
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(first))


def require_output(path: str | os.PathLike, option: str) -> None:
  """Checks, before any work, that a file can be written; a file may be there.

  Args:
    path: of the file; folders that are missing can be created.
    option: the option that names it, for the message.

  Raises:
    errors.UsageError: it is empty, a folder, no plain file, or no file can be
      written there.
  """
  if not os.fspath(path):
    raise errors.UsageError(f"{option} is empty: expected the name of a file.")
  if os.path.isdir(path):
    raise errors.UsageError(
      f"{option} {path} is a folder, but a file is expected. Give a name in it,"
      f" such as {os.path.join(path, 'new')}."
    )
  if os.path.exists(path) and not os.path.isfile(path):
    raise errors.UsageError(f"{option} {path} is no plain file. Give another.")
  if os.path.exists(path) and not os.stat(path).st_mode & 0o222:
    raise errors.UsageError(
      f"{option} {path} is there and may not be written to. Give another name."
    )
  require_output_folder(pathlib.Path(path).parent, option)


def require_report(
  path: str, option: str, is_own: Callable[[str], bool]
) -> None:
  """Checks, before any work, that a report can be written to a file.

  A file that is there is overwritten only if it is such a report: a slip of the
  hand must not cost the data that the report is about.

  Args:
    path: of the file.
    option: the option that names it, for the message.
    is_own: whether the first line of a file is that of such a report.

  Raises:
    errors.UsageError: see `require_output`, or another file is there.
  """
  files.require_local(path, f"the file of {option}")
  require_output(path, option)
  if not os.path.exists(path) or not os.path.getsize(path):
    return
  with open(path, encoding="utf-8", errors="replace") as file:
    first = file.readline(1 << 16)
  if not is_own(first):
    raise errors.UsageError(
      f"{option} {path} is there already, and is no earlier report of this"
      " kind. Give another name, or delete it first."
    )


def is_page(line: str) -> bool:
  """Returns whether the first line of a file is that of an HTML page."""
  return line.lower().startswith("<!doctype html")


def require_output_folder(path: str | os.PathLike, option: str) -> None:
  """Checks, before any work, that files can be created in a folder.

  Args:
    path: of the folder, which may be missing; of one in a store nothing is
      checked.
    option: the option that names it, or a file in it, for the message.

  Raises:
    errors.UsageError: it is a file, or may not be written to.
  """
  if files.is_remote(path):
    return
  path = pathlib.Path(path).absolute()
  there = next(one for one in (path, *path.parents) if one.exists())
  if not there.is_dir():
    raise errors.UsageError(
      f"{option}: {there} is a file, but a folder is expected. Give another"
      f" {option}."
    )
  if not os.access(there, os.W_OK | os.X_OK):
    raise errors.UsageError(
      f"{option}: nothing may be written to {there} (permission denied). Give"
      f" another {option}."
    )


# Arguments of class LaVIT that an option sets under another name.
_OPTIONS = {
  "num_beams": "--beams",
  "min_new_tokens": "--min-tokens",
  "max_new_tokens": "--max-tokens",
  "guidance_scale": "--guidance",
  "decoder_guidance_scale": "--decoder-guidance",
}


def in_options(message: str, args: argparse.Namespace) -> str:
  """Returns a message about arguments in the words of the command line.

  Args:
    message: of an error, in which an argument stands as `num_beams=3`; as an
      option it is `--beams 3`.
    args: of the command; arguments that it has no option for stay.
  """
  for name, value in vars(args).items():
    if value is not None:  # what was given, so that no part of a path is meant
      option = _OPTIONS.get(name) or f"--{name.replace('_', '-')}"
      given = re.escape(f"{name}={value!r}")
      said = f"{option} {value}".replace("\\", r"\\")  # not a group's number
      message = re.sub(rf"(?<!\S){given}(?!\w)", said, message)
  names = "|".join(name for name in _OPTIONS if name in vars(args))
  if names:  # without a value too: these are words of the API alone
    message = re.sub(rf"\b({names})\b", lambda m: _OPTIONS[m[1]], message)
  return message


def outputs(
  out: str, count: int, read: Sequence[str] = (), option: str = "--out"
) -> list[pathlib.Path]:
  """Returns the files for `count` images: out.png, or out_0.png, out_1.png, ….

  Args:
    out: the value of the option.
    count: number of images.
    read: images that the command reads, and so must not overwrite.
    option: the option, for messages.

  Raises:
    errors.UsageError: `out` has no image suffix, cannot be written, or an
      image that is read would be overwritten.
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
  for path in paths:
    require_output(path, option)
    require_not_read(path, option, read)
  return paths


def require_not_read(
  path: str | os.PathLike, option: str, read: Iterable[str]
) -> None:
  """Checks that a file to be written is none that the command reads.

  Args:
    path: of the file.
    option: the option that names it, for the message.
    read: files that are read; some may not exist.

  Raises:
    errors.UsageError: it is one of them, or a link to one.
  """
  originals = [name for name in read if os.path.exists(name)]
  if os.path.exists(path) and any(
    os.path.samefile(path, name) for name in originals
  ):
    raise errors.UsageError(
      f"{option} would write over {path}, which is read. Give another {option}."
    )


def save(images: Iterable[Any], paths: Sequence[pathlib.Path]) -> None:
  """Writes PIL images, each to its path; creates missing folders."""
  for image, path in zip(images, paths, strict=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
