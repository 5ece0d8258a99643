"""Commands that draw: generate, synthesize, reconstruct."""

import argparse
import contextlib
import json
import os
import re

from lavit_jax.commands import common
from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files

_PIXELS = (
  "seed",
  "steps",
  "decoder",
  "solver",
  "decoder_guidance_scale",
  "ratio",
  "size",
  "tile",
)
_WORDS = (
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


def add(subparsers) -> None:
  """Adds the commands of this file to the parser of `lavit`."""
  _add_generate(subparsers)
  _add_synthesize(subparsers)
  _add_reconstruct(subparsers)


def _add_drawing(parser: argparse.ArgumentParser, out: str) -> None:
  """Options of what draws; those not given are left to the model."""
  parser.add_argument(
    "--out",
    default=out,
    metavar="FILE",
    help=f"where to draw ({out}); several drawings are numbered",
  )
  parser.add_argument(
    "--seed", type=int, metavar="N", help="same seed, same drawing"
  )
  group = parser.add_argument_group(
    "how pixels are painted (by default as the pixel decoder wants it)"
  )
  kinds = {"N": int, "PIXELS": int, "X": common.number, "HxW": _size}
  for flag, kind, name, meaning in (
    ("--decoder", "NAME", "decoder", "highres, lowres or pixels"),
    ("--ratio", "W:H", "ratio", "1:1, 4:3, 3:2, 16:9, 2:3 or 3:4"),
    ("--size", "HxW", "size", "height and width, instead of a ratio"),
    ("--steps", "N", "steps", "steps of denoising"),
    ("--solver", "NAME", "solver", "ddim, or dpm++ for few steps"),
    (
      "--decoder-guidance",
      "X",
      "decoder_guidance_scale",
      "how closely pixels follow the visual words; 1 is off",
    ),
    ("--tile", "PIXELS", "tile", "decode in tiles, in less memory"),
  ):
    convert = kinds.get(kind, str)
    group.add_argument(
      flag, type=convert, metavar=kind, dest=name, help=meaning
    )
  group.add_argument(
    "--no-safety-check",
    action="store_false",
    dest="check_safety",
    help="show what the model's safety checker, if it has one, would withhold",
  )


def _size(text: str) -> tuple[int, int]:
  """512x768 as (512, 768)."""
  match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
  if not match:
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected height x width, such as 512x768"
    )
  return int(match[1]), int(match[2])


def _add_words(parser: argparse.ArgumentParser) -> None:
  """Options of the visual words; the model has its own defaults."""
  group = parser.add_argument_group(
    "how visual words are chosen (by default as the model wants it)"
  )
  real = common.number
  for flag, kind, name, meaning in (
    ("--guidance", real, "guidance_scale", "closeness to the prompt; 1: off"),
    ("--temperature", real, "temperature", "0 is greedy"),
    ("--top-k", int, "top_k", "keep the likeliest k words, 0 all"),
    ("--top-p", real, "top_p", "keep words that hold this probability"),
    ("--min-tokens", int, "min_new_tokens", "words at least"),
    ("--max-tokens", int, "max_new_tokens", "words at most"),
  ):
    metavar = "N" if kind is int else "X"
    group.add_argument(
      flag, type=kind, metavar=metavar, dest=name, help=meaning
    )
  group.add_argument(
    "--negative",
    metavar="TEXT",
    dest="negative_prompts",
    help="what guidance leads away from",
  )
  group.add_argument(
    "--ids",
    action="store_true",
    help="print the visual words and draw nothing (no pixel decoder needed)",
  )
  common.add_parity(group)


def _drawn(args: argparse.Namespace, prompts, shown, read=()) -> None:
  """Draws prompts, or prints their visual words; `shown` name them."""
  common.require_text(
    "--negative", [args.negative_prompts or ""], "Give words."
  )
  read = () if args.ids else read  # then nothing is drawn
  paths = common.outputs(args.out, len(prompts), read)
  lavit, options = _load(args), common.given(args, *_WORDS)
  if args.ids:
    rows = [
      {**name, "codes": codes.tolist()}
      for name, codes in zip(
        shown, lavit.write_codes(prompts, **options), strict=True
      )
    ]
    lines = [" ".join(map(str, row["codes"])) for row in rows]
    common.print_answer(args, rows, lines)
    return
  options |= common.given(args, *_PIXELS)
  with _bar() as tell:
    images = lavit.synthesize_batch(prompts, progress=tell, **options)
  _save(args, images, paths, shown)


def _load(args):
  """The `LaVIT` of `--model`, with or without its safety checker."""
  return common.load(args, check_safety=args.check_safety)


@contextlib.contextmanager
def _bar():
  """Gives a callback that shows how far a drawing is."""
  bars = []

  def tell(done, steps):
    if not bars:  # nothing is shown before the first step is done
      bars.append(progress.Progress(steps, label="drawing"))
    bars[0].update(done)

  try:
    yield tell
  finally:
    for bar in bars:
      bar.close()


def _save(args, images, paths, shown) -> None:
  """Writes drawings and prints where; those withheld are named."""
  from lavit_jax.infer.pixels import safety

  common.save(images, paths)
  rows, lines = [], []
  for name, path, image in zip(shown, paths, images, strict=True):
    withheld = safety.is_withheld(image)
    rows.append({**name, "file": str(path), "withheld": withheld})
    note = " (withheld by the safety checker, black)" if withheld else ""
    lines.append(f"{path}{note}")
  common.print_answer(args, rows, lines)


def _add_generate(subparsers) -> None:
  parser = common.command(
    subparsers,
    "generate",
    _generate,
    "draw images from text",
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
    "--count", type=int, default=1, metavar="N", help="drawings a prompt (1)"
  )
  _add_drawing(parser, "generated.png")
  _add_words(parser)


def _generate(args: argparse.Namespace) -> None:
  if args.count < 1:
    raise errors.UsageError(f"--count {args.count}: expected 1 or more.")
  hint = "Prompts with images go to lavit synthesize."
  common.require_text("a prompt", args.prompts, hint)
  prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
  _drawn(args, prompts, [{"prompt": prompt} for prompt in prompts])


def _add_synthesize(subparsers) -> None:
  parser = common.command(
    subparsers,
    "synthesize",
    _synthesize,
    "draw an image from texts and images in order",
    """\
    examples:
      lavit synthesize photo.png "make the large circle red" --out edited.png

    A part that is a file, or ends as an image's name does, is an image;
    every other part is text.
    """,
    compiles=True,
  )
  common.add_model(parser)
  parser.add_argument("parts", nargs="+", metavar="PART")
  _add_drawing(parser, "synthesized.png")
  _add_words(parser)


def _synthesize(args: argparse.Namespace) -> None:
  images = [
    os.path.isfile(part) or part.lower().endswith(common.SUFFIXES)
    for part in args.parts
  ]
  pairs = list(zip(args.parts, images, strict=True))
  read = [part for part, image in pairs if image]
  common.require_files(read)
  common.note_scenes(args, read)
  parts = [files.place(part) if image else part for part, image in pairs]
  _drawn(args, [parts], [{"parts": args.parts}], read)


def _add_reconstruct(subparsers) -> None:
  parser = common.command(
    subparsers,
    "reconstruct",
    _reconstruct,
    "draw images again from their visual tokens alone",
    """\
    examples:
      lavit reconstruct photo.jpg --out again.png
      lavit reconstruct *.jpg --out again.png      again_0.png, again_1.png, ...
      lavit reconstruct photo.jpg --model runs/lavit_7b --decoder lowres
      lavit tokenize photo.jpg --json > words.json
      lavit reconstruct --codes words.json         from words alone
    """,
    compiles=True,
  )
  common.add_model(parser)
  common.add_images(parser, nargs="*")
  parser.add_argument(
    "--codes",
    metavar="FILE",
    help="in place of images: what lavit tokenize --json, or generate --ids"
    " --json, has printed",
  )
  _add_drawing(parser, "reconstructed.png")


def _reconstruct(args: argparse.Namespace) -> None:
  if bool(args.images) == bool(args.codes):
    raise errors.UsageError(
      "Give images, or --codes FILE, and not both: see lavit reconstruct -h."
    )
  if args.codes:
    shown, codes = _read_codes(args.codes)
  else:
    common.require_files(args.images)
    common.note_scenes(args, args.images)
    shown = [{"image": image} for image in args.images]
  paths = common.outputs(args.out, len(shown), args.images)
  lavit, options = _load(args), common.given(args, *_PIXELS)
  with _bar() as tell:
    if args.codes:
      images = lavit.draw_codes(codes, progress=tell, **options)
    else:
      images = lavit.reconstruct(args.images, progress=tell, **options)
  _save(args, images, paths, shown)


def _read_codes(path: str):
  """Names and lists of words from a JSON file; UsageError if it has none."""
  common.require_files([path])
  try:
    rows = json.loads(files.place(path).read_bytes().decode("utf-8"))
    wrong = _wrong_codes(rows)
  except (ValueError, RecursionError) as error:
    wrong = f"it is no JSON in UTF-8 ({error})"
  if wrong:
    raise errors.UsageError(
      f'--codes {path}: {wrong}; expected a JSON list of {{"codes":'
      " [numbers]}, as lavit tokenize --json prints it."
    )
  codes = [row["codes"] for row in rows]
  names = ("image", "prompt", "parts")
  shown = [{k: row[k] for k in names if k in row} for row in rows]
  return shown, codes


def _wrong_codes(rows) -> str:
  """What is no list of rows with codes, and where; "" if nothing is wrong."""
  if not isinstance(rows, list) or not rows:
    return f"it holds {rows!r:.60}"
  for number, row in enumerate(rows, start=1):
    codes = row.get("codes") if isinstance(row, dict) else None
    if not isinstance(codes, list) or not codes:
      return f"row {number} has no codes: {row!r:.60}"
    for code in codes:
      whole = isinstance(code, int) and not isinstance(code, bool)
      if not whole or not 0 <= code < 1 << 31:
        return f"row {number} has a code {code!r:.40}"
  return ""
