"""The commands that make images: `generate`, `synthesize`, `reconstruct`."""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import common
from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files

with epy.lazy_imports():
  from lavit_jax.infer.pixels import options as options_lib
  from lavit_jax.infer.pixels import safety

# Keyword arguments of class LaVIT that have an option here.
_PIXEL_OPTIONS = (
  "seed",
  "steps",
  "decoder",
  "solver",
  "decoder_guidance_scale",
  "ratio",
  "size",
  "tile",
)
_TOKEN_OPTIONS = (
  "seed",
  "guidance_scale",
  "temperature",
  "top_k",
  "top_p",
  "min_new_tokens",
  "max_new_tokens",
  "negative_prompts",
  "parity",
)


def add(subparsers: Any) -> None:
  """Adds the commands of this file to the parser of `lavit`."""
  _add_generate(subparsers)
  _add_synthesize(subparsers)
  _add_reconstruct(subparsers)


def _add_drawing(parser: argparse.ArgumentParser, out: str) -> None:
  """Adds the options of a pixel decoder, which has defaults of its own."""
  parser.add_argument(
    "--out",
    default=out,
    metavar="FILE",
    help=f"the image file ({out}); several images are numbered",
  )
  parser.add_argument(
    "--seed", type=common.SEED, metavar="N", help="same seed, same image"
  )
  group = parser.add_argument_group(
    "how pixels are decoded (the pixel decoder has its own defaults)"
  )
  kinds: dict[str, Callable[[str], Any]] = {
    "N": common.integer(1),
    "PIXELS": common.integer(1),
    "X": common.number,
    "HxW": _size,
  }
  for flag, kind, name, meaning in (
    ("--decoder", "NAME", "decoder", "highres, lowres or pixels"),
    ("--ratio", "W:H", "ratio", "1:1, 4:3, 3:2, 16:9, 2:3 or 3:4"),
    ("--size", "HxW", "size", "height and width, instead of a ratio"),
    ("--steps", "N", "steps", "denoising steps"),
    ("--solver", "NAME", "solver", "ddim, or dpm++ for few steps"),
    (
      "--decoder-guidance",
      "X",
      "decoder_guidance_scale",
      "how closely pixels follow the visual tokens; 1 is off",
    ),
    ("--tile", "PIXELS", "tile", "decode in tiles of this side: less memory"),
  ):
    convert = kinds.get(kind, str)
    group.add_argument(
      flag, type=convert, metavar=kind, dest=name, help=meaning
    )
  group.add_argument(
    "--no-safety-check",
    action="store_false",
    dest="check_safety",
    help="show images that the model's safety checker would withhold",
  )


def _size(text: str) -> tuple[int, int]:
  """Parses a size: "512x768" gives (512, 768), height and width."""
  match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
  if not match:
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected height x width, such as 512x768"
    )
  height, width = int(match[1]), int(match[2])
  if not min(height, width):
    raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more of both")
  return height, width


def _add_generation(parser: argparse.ArgumentParser) -> None:
  """Adds the options of generating visual tokens; presets have defaults."""
  group = parser.add_argument_group(
    "how visual tokens are generated (by default as the model's preset says)"
  )
  real, fewest, most = common.number, common.integer(0), common.integer(1)
  for flag, kind, name, meaning in (
    ("--guidance", real, "guidance_scale", "closeness to the prompt; 1: off"),
    ("--temperature", real, "temperature", "0 is greedy"),
    ("--top-k", fewest, "top_k", "sample from the k most probable; 0: all"),
    ("--top-p", real, "top_p", "sample from the top of this probability"),
    ("--min-tokens", fewest, "min_new_tokens", "smallest number of tokens"),
    ("--max-tokens", most, "max_new_tokens", "largest number of tokens"),
  ):
    metavar = "X" if kind is real else "N"
    group.add_argument(
      flag, type=kind, metavar=metavar, dest=name, help=meaning
    )
  group.add_argument(
    "--negative",
    metavar="TEXT",
    dest="negative_prompts",
    help="a prompt that guidance steers away from",
  )
  group.add_argument(
    "--ids",
    action="store_true",
    help="print the visual tokens alone (no pixel decoder needed)",
  )
  common.add_parity(group)


def _generate_images(
  args: argparse.Namespace,
  prompts: Sequence[Any],
  labels: Sequence[Mapping[str, Any]],
  read: Sequence[str] = (),
) -> None:
  """Generates an image for each prompt; with --ids prints its visual tokens.

  Args:
    args: of the command.
    prompts: as `LaVIT.synthesize_batch` takes them.
    labels: fields that name each prompt in the output.
    read: image files among the prompts.
  """
  common.require_text(
    "--negative", [args.negative_prompts or ""], "Give words."
  )
  # With --ids no image is written.
  paths = [] if args.ids else common.outputs(args.out, len(prompts), read)
  lavit = _load(args, len(prompts))
  options = common.chosen(args, *_TOKEN_OPTIONS)
  if args.ids:
    rows = [
      {**label, "codes": codes.tolist()}
      for label, codes in zip(
        labels, lavit.write_codes(prompts, **options), strict=True
      )
    ]
    lines = [" ".join(map(str, row["codes"])) for row in rows]
    common.print_answer(args, rows, lines)
    return
  options |= common.chosen(args, *_PIXEL_OPTIONS)
  with _progress_bar() as report:
    images = lavit.synthesize_batch(prompts, progress=report, **options)
  _save(args, images, paths, labels)


def _load(args, images):
  """Opens the model of `--model`, with or without its safety checker."""
  return common.load(args, images=images, check_safety=args.check_safety)


@contextlib.contextmanager
def _progress_bar() -> Iterator["options_lib.Progress"]:
  """Yields a callback (steps done, steps) that shows a progress bar."""
  bars: list[progress.Progress] = []

  def report(done, steps):
    if not bars:  # the bar appears with the first step
      bars.append(progress.Progress(steps, label="drawing"))
    bars[0].update(done)

  try:
    yield report
  finally:
    for bar in bars:
      bar.close()


def _save(args, images, paths, labels) -> None:
  """Writes images and prints their files, and which were withheld."""
  common.save(images, paths)
  rows, lines = [], []
  for label, path, image in zip(labels, paths, images, strict=True):
    withheld = safety.is_withheld(image)
    rows.append({**label, "file": str(path), "withheld": withheld})
    note = " (withheld by the safety checker, black)" if withheld else ""
    lines.append(f"{path}{note}")
  common.print_answer(args, rows, lines)


def _add_generate(subparsers) -> None:
  parser = common.command(
    subparsers,
    "generate",
    _generate,
    "generate images from text",
    """\
    examples:
      lavit generate "a large red circle at the top left"
      lavit generate "a small blue square" --count 4 --seed 7 --out square.png
      lavit generate "a green star" --guidance 4 --steps 50
      lavit generate "a green star" --negative "a red star" --ids
      lavit generate "a cat" --model runs/lavit_7b --ratio 16:9 --solver dpm++
    """,
    compiles=True,
  )
  common.add_model(parser)
  parser.add_argument("prompts", nargs="+", metavar="PROMPT")
  parser.add_argument(
    "--count",
    type=common.integer(1, 10_000),
    default=1,
    metavar="N",
    help="images per prompt (1)",
  )
  _add_drawing(parser, "generated.png")
  _add_generation(parser)


def _generate(args: argparse.Namespace) -> None:
  hint = "Prompts with images go to lavit synthesize."
  common.require_text("a prompt", args.prompts, hint)
  prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
  labels = [{"prompt": prompt} for prompt in prompts]
  _generate_images(args, prompts, labels)


def _add_synthesize(subparsers) -> None:
  parser = common.command(
    subparsers,
    "synthesize",
    _synthesize,
    "generate an image from texts and images in order",
    """\
    examples:
      lavit synthesize photo.png "make the large circle red" --out edited.png

    A part that is a file, or has the suffix of an image, is an image; every
    other part is text.
    """,
    compiles=True,
  )
  common.add_model(parser)
  parser.add_argument("parts", nargs="+", metavar="PART")
  _add_drawing(parser, "synthesized.png")
  _add_generation(parser)


def _synthesize(args: argparse.Namespace) -> None:
  images = [
    os.path.isfile(part) or part.lower().endswith(common.SUFFIXES)
    for part in args.parts
  ]
  pairs = list(zip(args.parts, images, strict=True))
  read = [part for part, image in pairs if image]
  common.require_files(read)
  common.note_scenes(args, read)
  parts = [files.input_path(part) if image else part for part, image in pairs]
  _generate_images(args, [parts], [{"parts": args.parts}], read)


def _add_reconstruct(subparsers) -> None:
  parser = common.command(
    subparsers,
    "reconstruct",
    _reconstruct,
    "decode images from their own visual tokens",
    """\
    examples:
      lavit reconstruct photo.jpg --out again.png
      lavit reconstruct *.jpg --out again.png      again_0.png, again_1.png, ...
      lavit reconstruct photo.jpg --model runs/lavit_7b --decoder lowres
      lavit tokenize photo.jpg --json > tokens.json
      lavit reconstruct --codes tokens.json        from visual tokens alone
    """,
    compiles=True,
  )
  common.add_model(parser)
  common.add_images(parser, nargs="*")
  parser.add_argument(
    "--codes",
    metavar="FILE",
    help="in place of images: the output of lavit tokenize --json, or of"
    " generate --ids --json",
  )
  _add_drawing(parser, "reconstructed.png")


def _reconstruct(args: argparse.Namespace) -> None:
  if bool(args.images) == bool(args.codes):
    raise errors.UsageError(
      "Give images or --codes FILE, not both: see lavit reconstruct -h."
    )
  if args.codes:
    labels, codes = _read_codes(args.codes)
  else:
    common.require_files(args.images, several=True)
    common.note_scenes(args, args.images)
    labels = [{"image": image} for image in args.images]
  read = args.images or [args.codes]
  paths = common.outputs(args.out, len(labels), read)
  lavit = _load(args, len(labels))
  options = common.chosen(args, *_PIXEL_OPTIONS)
  with _progress_bar() as report:
    if args.codes:
      images = lavit.draw_codes(codes, progress=report, **options)
    else:
      images = lavit.reconstruct(args.images, progress=report, **options)
  _save(args, images, paths, labels)


def _read_codes(path: str) -> tuple[list[dict[str, Any]], list[list[int]]]:
  """Reads visual tokens from a JSON file.

  Returns:
    (fields that name each image, its codes).

  Raises:
    errors.UsageError: the file does not hold a list of codes.
  """
  common.require_files([path])
  try:
    rows = json.loads(files.input_path(path).read_bytes().decode("utf-8"))
    problem = _codes_problem(rows)
  except (ValueError, RecursionError) as error:
    problem = f"it is no JSON in UTF-8 ({error})"
  if problem:
    raise errors.UsageError(
      f'--codes {path}: {problem}; expected a JSON list of {{"codes":'
      " [numbers]}, as lavit tokenize --json prints it."
    )
  codes = [row["codes"] for row in rows]
  names = ("image", "prompt", "parts")
  labels = [{k: row[k] for k in names if k in row} for row in rows]
  return labels, codes


def _codes_problem(rows: Any) -> str:
  """Returns why this is not a list of rows with codes; "" if it is one."""
  if not isinstance(rows, list) or not rows:
    return f"it holds {rows!r:.60}"
  for number, row in enumerate(rows, start=1):
    codes = row.get("codes") if isinstance(row, dict) else None
    if not isinstance(codes, list) or not codes:
      return f"row {number} has no codes: {row!r:.60}"
    for code in codes:
      is_integer = isinstance(code, int) and not isinstance(code, bool)
      if not is_integer or not 0 <= code < 1 << 31:
        return f"row {number} has a code {code!r:.40}"
  return ""
